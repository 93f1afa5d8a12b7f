"""Negative controls: with its bug planted, the test of each row of the table of faults must fail, and for that bug.

A row of `CONTROLS` names a test, a plant of `mutations.py`, and words of the failure. The test runs as it is, with shorter waits; the server it asks,
and this process, have the bug. Controls that need more than a plant stand beside their tests, named `…_control_…`."""
import concurrent.futures
import contextlib
import inspect
import os
import re
import signal
import traceback
import uuid
from pathlib import Path

import httpx
import mutations
import pytest
import servers
import test_bfloat16
import test_classes
import test_scheduler
import test_conformance
import test_decoding
import test_detectors
import test_endurance
import test_evaluation
import test_gpu
import test_grpc
import test_http_limits
import test_invariance
import test_isolation
import test_large_bodies
import test_lite
import test_local_code
import test_pipelining
import test_platforms
import test_protocols
import test_python
import test_ragged
import test_reference
import test_server
import test_sizes
import test_streaming
import test_uploads
import torch

from commands import TESTS

H, C, P, B, S, D, I = test_http_limits, test_conformance, test_protocols, test_scheduler, test_server, test_endurance, test_invariance
T, V, R, X = test_platforms, test_evaluation, test_reference, test_isolation
Y, K, G, U, L, Q = test_decoding, test_pipelining, test_gpu, test_uploads, test_large_bodies, test_grpc
HELD = r"never came true|timed out|TimeoutExpired"  # what was to come did not come
CONTROLS = [  # row, test, its parameters, plant, words of the failure
    ("A1", R.test_A1_what_depends_on_values_is_refused_with_its_line_or_kept_whole, {"model": R.Branch, "line": "if x.max()", "graph": R.BranchInGraph, "format": "torchscript"}, "values_are_read_unseen", "otherwise than the live model"),
    ("A1", R.test_A1_no_way_out_of_a_tensor_is_missed, {"read": lambda x: x * torch.tensor([x.max(), 1, 1])}, "only_the_dispatcher_is_heard", "otherwise than the live model"),
    ("A1", R.test_A1_what_depends_on_sizes_is_no_refusal, {"name": "hand-written"}, "sizes_are_values", "Refused.*x.ndim"),
    ("A1", R.test_A1_the_live_model_answers_held_back_rows_and_the_saved_one_must_agree, {}, "the_saved_program_answers_held_back_rows", "DID NOT RAISE"),
    ("A1", R.test_A1_the_saved_program_answers_what_is_unlike_the_example, {"read": R.UNSEEN["what a trace is not asked"]}, "only_the_example_is_asked", "DID NOT RAISE"),
    ("A1", R.test_A1_a_value_of_the_first_call_is_never_frozen, {"lazy": R.LazyNumber, "format": "torchscript"}, "no_program_is_fresh", "DID NOT RAISE"),
    ("A1", R.test_A1_the_answers_of_another_model_are_never_taken, {}, "held_back_answers_are_anybodys", "DID NOT RAISE"),
    ("A1", test_sizes.test_A1_a_length_that_a_trace_took_from_the_example_is_refused, {}, "only_the_examples_size_is_proved", "DID NOT RAISE"),
    ("A2", test_detectors.test_A2_boxes_that_are_as_many_as_pictures_are_no_rows, {"each": ([(4, 4)], [(11, 8)])}, "rows_are_counted_in_the_example_alone", "nothing to compare|DID NOT RAISE"),
    ("A2", test_detectors.test_A2_every_batch_that_is_tried_is_counted, {}, "rows_are_counted_in_the_example_alone", "DID NOT RAISE"),
    ("A2", test_ragged.test_A2_pictures_of_several_clients_share_a_call_and_each_has_its_own_boxes, {}, "boxes_are_cut_as_rows_are", "assert|Broken|shape"),
    ("A2", test_ragged.test_A2_a_client_that_chooses_boxes_alone_has_those_of_each_picture, {}, "counts_are_not_asked_for", "array_equal|isinstance"),
    ("A2", test_ragged.test_A2_counts_that_do_not_hold_are_refused, {}, "counts_are_believed", "DID NOT RAISE|out of bounds"),
    ("A2", test_ragged.test_A2_an_answer_that_is_counted_wrongly_reaches_nobody, {}, "counts_are_believed", "DID NOT RAISE"),
    ("A2", test_ragged.test_A2_boxes_in_another_order_than_their_pictures_are_refused, {}, "only_the_counts_are_compared", "DID NOT RAISE"),
    ("A2", test_sizes.test_A2_padding_that_changes_an_answer_is_refused, {}, "padding_is_believed", "DID NOT RAISE"),
    ("A2", test_streaming.test_A2_requests_of_another_rate_never_share_a_call, {}, "a_rate_is_no_part_of_the_key", "answered at another rate"),
    ("A2", test_streaming.test_A2_a_state_whose_batch_nobody_declared_is_refused, {}, "python_is_taken_at_its_word", "DID NOT RAISE"),
    ("A2", test_streaming.test_A2_a_state_that_is_mixed_between_rows_is_refused, {}, "python_is_taken_at_its_word", "DID NOT RAISE"),
    ("A4", T.test_A4_a_server_that_was_told_nothing_claims_nothing, {}, "an_untold_version_is_1", r"\[\"versions\"\] == \[\]"),
    ("A5", test_local_code.test_A5_code_that_was_edited_after_its_import_is_not_what_the_notebook_tried, {}, "the_first_module_of_a_name_is_everybodys", "DID NOT RAISE"),
    ("A5", test_local_code.test_A5_two_packages_of_one_process_have_each_their_own_code, {}, "the_first_module_of_a_name_is_everybodys", r"they answered"),
    ("A5", test_local_code.test_A5_a_module_that_is_imported_late_is_the_locked_one, {}, "modules_are_read_when_they_are_imported", "it took 9"),
    ("A5", test_local_code.test_A5_a_module_that_is_not_as_it_was_locked_never_runs, {}, "modules_are_not_held_against_the_lock", "DID NOT RAISE|never ran"),
    ("A1", test_python.test_A1_files_that_answer_otherwise_are_refused, {}, "python_is_taken_at_its_word", "DID NOT RAISE"),
    ("A2", test_python.test_A2_what_is_asked_before_or_beside_changes_no_answer, {"name": "Beside", "words": "beside it"}, "python_is_taken_at_its_word", "DID NOT RAISE"),
    ("A3", test_python.test_A3_a_class_may_write_to_what_it_is_given, {}, "python_works_on_what_came_in", "assert|bytes|otherwise|differ"),
    ("A3", test_python.test_A3_a_gap_in_text_is_none_and_no_text, {}, "gaps_in_text_are_texts", r"\[False, True\]"),
    ("A6", test_classes.test_A6_a_column_of_probabilities_is_told_by_its_class, {"kind": "numbers that do not sort as texts do"}, "classes_are_sorted_as_texts", "is another column"),
    ("A6", test_classes.test_A6_classes_that_are_not_the_models_own_are_refused, {}, "given_classes_are_believed", "DID NOT RAISE"),
    ("A6", test_classes.test_A6_an_order_that_labels_speak_against_is_refused, {}, "labels_are_not_asked_for_the_order", "DID NOT RAISE"),
    ("A6", test_classes.test_A6_the_files_of_a_class_have_the_classes_of_the_live_object, {}, "classes_of_files_are_believed", "DID NOT RAISE"),
    ("N1", H.test_N1_a_slow_head_is_told_408, {}, "no_deadline_for_a_head", HELD),
    ("N1", H.test_N1_a_head_that_drips_has_one_deadline_for_all_of_it, {}, "every_byte_of_a_head_starts_its_deadline_anew", HELD),
    ("N1", D.test_N1_N2_N3_slow_clients_disturb_nobody, {"kind": "N1 a head that drips", "room": True, "clients": 25, "duration": 3}, "no_deadline_for_a_head", "ended by the server"),
    ("N2", H.test_N2_health_is_answered_when_silent_connections_hold_every_place, {}, "health_has_no_places_of_its_own", "503 == 200"),
    ("N2", H.test_N2_over_the_limit_other_requests_are_told_503, {}, "connections_without_limit", "list|200"),
    ("N2", D.test_N1_N2_N3_slow_clients_disturb_nobody, {"kind": "N1 a head that drips", "room": False, "clients": 25, "duration": 3}, "health_has_no_places_of_its_own", "503"),
    ("N3", H.test_N3_a_slow_body_is_told_408_and_holds_no_place_in_the_queue, {}, "no_deadline_for_a_body", HELD),
    ("N3", H.test_N3_a_reader_that_never_reads_is_ended, {}, "no_deadline_for_a_reader", HELD),
    ("N3", D.test_N1_N2_N3_slow_clients_disturb_nobody, {"kind": "N3 a body that drips", "room": True, "clients": 25, "duration": 3}, "no_deadline_for_a_body", "ended by the server"),
    ("N4", H.test_N4_a_body_over_the_limit_is_told_413_before_it_is_read, {}, "a_body_is_measured_after_it_was_read", "(408|503) == 413"),
    ("N4", H.test_N4_a_chunked_body_over_the_limit_is_told_413_and_memory_stays, {}, "only_announced_bodies_are_measured", "408 == 413"),
    ("N4", H.test_N4_a_gzip_bomb_is_told_413, {}, "all_is_inflated_before_it_is_measured", "no more is inflated"),
    ("N4", L.test_N4_who_announces_much_and_sends_little_takes_no_room, {}, "what_is_announced_takes_room", "503|200"),
    ("N4", L.test_N4_a_body_is_let_go_with_its_answer_and_no_collector_of_cycles_is_waited_for, dict(zip(("sent", "status"), next(L.ways())[:0:-1])), "a_call_and_its_work_keep_each_other", "kB that stay"),
    ("N8", L.test_N8_cut_anywhere_a_long_body_means_the_same_and_so_does_what_is_behind_it, {}, "a_long_body_takes_what_is_behind_it", "ended|NoneType|timed out"),
    ("N5", H.test_N5_many_tiny_chunks_cost_little, {"rounds": 5}, "every_chunk_is_kept", "'kept'"),
    ("N5", H.test_N5_many_tiny_chunks_cost_little, {"rounds": 5}, "every_chunk_copies_the_body", "'copied'"),
    ("N5", H.test_N5_chunks_that_are_mostly_wrapping_are_refused, {}, "the_wrapping_of_chunks_is_not_counted", "408 == 400"),
    ("N5", H.test_N5_tiny_chunks_without_number_are_refused_whoever_asks, {"size": 8}, "chunks_of_any_size", "413 == 400"),
    ("N6", H.test_N6_a_head_that_is_too_large_is_refused_early, {"head": b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 2**20, "status": 431}, "a_head_without_limit", "408 == 431"),
    ("N7", H.test_N7_a_head_with_two_meanings_is_400_and_nothing_behind_it_is_a_request, {"rest": H.TWO_MEANINGS["two hosts"]}, "heads_are_taken_as_they_come", "ended"),
    ("N7", H.test_N7_a_head_with_two_meanings_is_400_and_nothing_behind_it_is_a_request, {"rest": H.TWO_MEANINGS["length and chunks"]}, "a_lenient_parser", "ended"),
    ("N7", H.test_N7_no_host_other_versions_and_other_targets_are_400, {"first": b"POST /predict HTTP/1.1\r\ncontent-length: 0\r\n\r\n"}, "heads_are_taken_as_they_come", "ended"),
    ("N8", H.test_N8_pipelined_requests_are_answered_in_order_with_their_own_ids, {}, "answers_go_out_when_they_are_ready", "x-request-id"),
    ("N8", H.test_N8_an_early_answer_closes_the_connection, {}, "an_early_answer_keeps_its_connection", "connection"),
    ("N8", H.test_N8_cut_anywhere_a_request_means_the_same, {}, "a_head_must_come_in_one_piece", "400 == 200"),
    ("N9", Q.test_N9_a_client_that_cancels_frees_its_place_and_what_waits_is_never_run, {}, "nobody_hears_a_client_leave", HELD),
    ("N3", Q.test_N3_a_message_that_does_not_come_is_not_waited_for, {}, "a_message_has_all_the_time_there_is", "< 10"),
    ("N4", Q.test_N4_a_message_over_the_limits_is_resource_exhausted, {}, "a_message_is_parsed_whatever_its_size", "DID NOT RAISE|RESOURCE_EXHAUSTED"),
    ("N4", Q.test_N4_a_long_message_is_few_times_in_memory, {}, "raw_contents_are_copied", "times in memory"),
    ("N2", Q.test_connections_have_a_limit, {}, "grpc_has_connections_without_limit", HELD),
    ("N3", Q.test_calls_that_send_nothing_keep_health_and_predictions_for_others, {}, "calls_that_send_nothing_count_as_predictions", "RESOURCE_EXHAUSTED"),
    ("N3", Q.test_few_messages_may_be_late, {}, "any_number_of_messages_may_be_late", "DEADLINE_EXCEEDED"),
    ("N4", Q.test_N4_a_message_that_is_long_in_coming_has_a_place_or_is_refused_at_once, {}, "a_message_is_long_after_a_second", "it took"),
    ("N4", Q.test_a_refused_message_is_let_go, {}, "a_refusal_keeps_its_message", "kB that stay"),
    ("N4", Q.test_parts_without_number_are_refused_before_they_are_read, {}, "parts_are_not_counted", "allowed are 1024"),
    ("N7", Q.test_a_name_that_is_no_text_ends_nothing, {}, "a_port_that_ends_stays_closed", HELD),
    ("N2", Q.test_the_health_service_is_asked_and_watched, {}, "one_client_may_take_all_watches", "<= 16"),
    ("L3", Q.test_who_is_silent_does_not_hold_up_the_end, {}, "who_is_silent_is_waited_for", HELD),
    ("E5", Q.test_E5_a_full_queue_is_unavailable_and_those_that_were_taken_are_answered, {}, "a_queue_without_bound", r"== \{None, .UNAVAILABLE.\}"),
    ("E6", Q.test_E6_a_deadline_is_kept, {}, "nobody_looks_at_the_deadline", "DID NOT RAISE"),
    ("L3", Q.test_L3_what_was_taken_is_answered_while_the_server_stops, {}, "calls_are_cut_when_the_server_stops", "RpcError|CANCELLED|UNAVAILABLE"),
    ("N9", S.test_N9_a_client_that_leaves_while_queued_is_never_run, {}, "nobody_hears_a_client_leave", HELD),
    ("N9", S.test_N9_a_client_that_leaves_while_running_frees_its_place, {}, "nobody_hears_a_client_leave", HELD),
    ("N10", H.test_N10_a_path_has_one_spelling, {"path": "/v2/%2e%2e/metrics"}, "other_spellings_are_mended", "text/plain|200"),
    ("N10", C.test_nothing_is_at_other_paths, {}, "an_administration_route", "405 == 404"),
    ("N10", S.test_no_route_administers_takes_a_url_or_unpickles, {}, "an_administration_route", "load"),
    ("N11", Y.test_N11_compressed_bodies_that_inflate_a_thousandfold_are_413_and_disturb_nobody, {}, "the_path_is_chosen_by_what_travels", "liveness took|None|" + HELD),
    ("N11", Y.test_N11_one_body_of_json_over_its_limit_is_413_before_it_is_read, {}, "json_has_no_limit_of_its_own", HELD),
    ("N11", Y.test_N11_what_is_long_to_read_disturbs_nobody, {}, "everything_is_read_in_this_process", "liveness took|gibibyte|None|" + HELD),
    ("N11", Y.test_N11_24_at_once_of_each_kind_disturb_nobody, {"kind": "rows of one", "packed": True}, "the_path_is_chosen_by_what_travels", "liveness took|None|" + HELD),
    ("N11", Y.test_N11_no_socket_is_read_twice_in_a_turn_of_the_loop, {}, "bodies_are_read_as_fast_as_they_come", "a socket was read on"),
    ("N11", Y.test_N11_a_long_body_is_kept_as_it_came, {}, "a_long_body_is_one_array", "no attribute 'pieces'"),
    ("N11", Y.test_N11_all_requests_share_one_budget, {}, "what_is_decoded_is_not_counted", r"\{200\} == \{200, 503\}|\[200"),
    ("N11", U.test_N11_the_parts_of_a_form_are_counted_beside_it, {}, "parts_of_a_form_are_not_counted", "200 == 503"),
    ("N11", U.test_N11_a_list_of_files_has_its_bound, {}, "a_form_has_any_number_of_parts", "DID NOT RAISE"),
    ("V1", U.test_V1_a_form_that_is_wrong_has_its_status_and_its_sentence, {"name": "doubled"}, "the_last_of_two_parts_wins", "200 == 400"),
    ("N12", K.test_N12_whatever_comes_in_whatever_pieces_each_is_answered_in_order, {}, "two_waiting_requests_stop_the_reading", "never goes on|nothing is read"),
    ("N12", K.test_N12_a_client_that_leaves_at_any_point_leaves_nothing, {}, "what_waits_outlives_its_client", "waiting|receiving|answer to nobody"),
    ("N12", K.test_N12_thousands_behind_a_slow_one_wait_as_they_came, {}, "a_read_is_parsed_to_its_end", "wait parsed"),
    ("N12", K.test_N12_an_application_that_asks_for_its_body_reads_no_request, {}, "an_application_has_a_say_in_what_is_read", "while some wait"),
    ("N12", K.test_N12_two_requests_in_one_write_and_then_a_third, {}, "two_waiting_requests_stop_the_reading", HELD + "|NoneType"),
    ("N12", K.test_N12_who_waits_to_go_on_is_told_so_when_it_is_its_turn, {}, "nobody_is_told_to_go_on_later", HELD + "|408 == 100"),
    ("N12", K.test_N12_an_offered_upgrade_is_passed_over, {}, "an_upgrade_ends_the_request", "error|NoneType|timed out"),
    ("V1", P.test_V1_a_long_list_is_read_in_pieces_as_a_short_one_is_at_once, {}, "brackets_of_a_long_list_stand_where_they_like", "assert"),
    ("V1", P.test_malformed, {"name": "V1-nesting-250000"}, "json_as_the_standard_library_reads_it", "recursion"),
    ("V1", C.test_V1_a_broken_body_is_400, {"route": "/predict", "body": C.BROKEN["deep"]}, "json_as_the_standard_library_reads_it", "500 == 400"),
    ("V2", P.test_malformed, {"name": "V2-shape-wraps"}, "sizes_are_multiplied_in_64_bits", "reshape|Maximum allowed"),
    ("V2", C.test_V2_V3_wrong_tensors_are_400, {"route": "/predict", "rows": [[1]]}, "shapes_are_believed", "500 == 400"),
    ("V2", C.test_V2_V4_what_is_not_the_contract_is_400, {"change": {"shape": [2, 1]}}, "shapes_are_believed", "500 == 400"),
    ("V3", P.test_v3_a_number_is_exact_or_refused_never_wrapped, {}, "numbers_are_cast", "assert"),
    ("V3", P.test_V3_a_row_of_a_table_is_read_alone_as_in_company, {}, "a_row_that_comes_alone_is_cast", "2.5"),
    ("V3", test_bfloat16.test_V3_a_number_is_rounded_to_bfloat16_as_torch_does, {}, "bfloat16_is_cut", "assert"),
    ("V3", test_bfloat16.test_V3_what_would_be_infinite_in_bfloat16_is_refused, {}, "what_bfloat16_cannot_hold_is_infinite", "DID NOT RAISE"),
    ("V3", test_bfloat16.test_V3_two_bytes_of_triton_s_client_are_the_upper_half, {}, "two_bytes_are_a_half", "assert"),
    ("V3", C.test_V2_V3_wrong_tensors_are_400, {"route": "/predict", "rows": [[True, 1]]}, "numbers_are_cast", "200 == 400"),
    ("V3", test_bfloat16.test_V3_the_function_of_mlflow_holds_each_number_or_refuses_it, {}, "mlflow_s_numbers_are_cast", "DID NOT RAISE"),
    ("V3", test_streaming.test_V3_a_number_with_a_fraction_is_no_int, {"file": False}, "a_fraction_is_cut", "DID NOT RAISE"),
    ("V4", C.test_V4_a_query_is_refused_where_it_would_be_ignored, {"route": "/predict"}, "a_query_is_passed_over", "200"),
    ("V4", C.test_V2_V4_what_is_not_the_contract_is_400, {"change": {"datatype": "FP64"}}, "the_datatype_is_not_compared", "200 == 400"),
    ("V4", C.test_V4_missing_extra_and_repeated_inputs_and_outputs_are_400, {}, "the_last_of_two_wins", "200 == 400"),
    ("V5", P.test_nul_in_bytes_is_data, {}, "texts_end_at_a_nul", "a.x00b"),
    ("V5", P.test_malformed, {"name": "V5-infinity"}, "infinity_is_a_number", "DID NOT RAISE"),
    ("V6", P.test_v6_is_refused_before_anything_is_built, {}, "a_tensor_is_measured_after_it_was_built", "nothing is built"),
    ("V6", P.test_v6_a_bomb_is_not_inflated_beyond_the_limit, {}, "all_is_inflated_before_it_is_measured", "peak"),
    ("V7", P.test_v7_fuzzed_binary_bodies_are_refused_or_meet_the_contract, {}, "the_length_of_a_header_is_believed", "crash"),
    ("V7", C.test_V7_a_header_length_that_lies_is_400_and_the_next_request_is_right, {"header": "abc"}, "the_length_of_a_header_is_believed", "500 == 400"),
    ("V7", C.test_V7_a_tensor_size_that_lies_is_400, {"size": 12}, "the_size_of_a_tensor_is_believed", "(200|500) == 400"),
    ("V4", C.test_V4_a_codec_is_followed_or_refused, {"change": {"parameters": {"content_type": "datetime"}}, "status": 400}, "a_codec_is_passed_over", "200 == 400"),
    ("V8", C.test_V8_a_name_in_the_body_is_the_served_one, {}, "a_name_in_the_body_is_not_read", "200 == 404"),
    ("V8", C.test_V8_another_name_is_404, {"name": "nope"}, "a_name_is_a_path", "200 == 404"),
    ("V8", S.test_V8_no_name_opens_a_file, {"name": "nope"}, "a_name_is_a_path", "package.lock"),
    ("V10", C.test_V10_as_many_answers_as_rows_or_a_refusal, {"media": "text/csv", "body": b"1,2\n\n3,4\n", "rows": 400}, "empty_lines_are_skipped", "200 == 400"),
    ("V10", C.test_V10_as_many_answers_as_rows_or_a_refusal, {"media": "text/csv", "body": b"a,b\n1,2\n", "rows": 400}, "a_first_line_that_is_no_row_is_a_header", "200 == 400"),
    ("V10", P.test_malformed, {"name": "V10-csv-features"}, "a_first_line_that_is_no_row_is_a_header", "DID NOT RAISE"),
    ("V10", P.test_V10_no_row_is_lost_or_invented_in_csv_and_json_lines, {}, "a_text_may_end_its_line", "distinct failures|CSV|cells"),
    ("V9", S.test_V9_no_error_tells_what_is_inside, {}, "an_error_tells_all_it_knows", "1024|canary"),
    ("E1", S.test_E1_one_poisoned_request_fails_alone, {}, "a_batch_fails_as_a_whole", "right"),
    ("E1", test_ragged.test_E1_a_request_that_is_counted_wrongly_fails_alone, {}, "a_miscount_breaks_the_contract", "True, True|broken is None"),
    ("E2", S.test_E2_a_value_that_is_no_number_fails_its_request_alone, {}, "what_is_no_number_is_passed_on", "500 if i == 3"),
    ("E3", S.test_E3_a_broken_contract_makes_the_server_not_ready_until_it_is_proved_again, {}, "answers_are_not_checked", "200 == 500"),
    ("E4", S.test_E4_no_answer_goes_to_another_request, {"count": 50_000}, "rows_go_to_the_neighbour", "wrong"),
    ("E5", S.test_E5_a_full_queue_is_told_503_and_all_that_is_accepted_is_answered, {}, "a_queue_without_bound", r"\{200\} == \{200, 503\}"),
    ("E6", S.test_E6_a_deadline_is_kept_in_the_queue_and_in_the_model, {}, "nobody_looks_at_the_deadline", "200 == 504"),
    ("E7", S.test_E7_a_hung_worker_is_found_and_the_process_ends_with_70, {"command": S.HOLD, "where": 0.002}, "nobody_watches_the_worker", HELD),
    ("E7", S.test_E7_liveness_is_answered_while_the_model_is_busy, {}, "the_model_runs_on_the_event_loop", "done|begin"),
    ("E8", B.test_E8_E9_memory_runs_out_and_a_half_fits, {"error": MemoryError()}, "memory_errors_are_like_others", "seen ==|all"),
    ("E9", B.test_E9_a_lost_device_ends_the_work, {}, "a_lost_device_is_like_others", "DeviceLost"),
    ("E9", B.test_E9_a_wrapped_error_is_recognised, {}, "only_the_outer_error_is_looked_at", "Unavailable"),
    ("E9", G.test_E9_a_gpu_that_is_lost_while_nobody_asks_ends_the_server, {"fault": "cuStreamSynchronize=719", "reason": "kernel_failed"}, "nobody_watches_the_gpu", HELD),
    ("E9", G.test_E9_who_waits_for_a_lost_gpu_is_told_503, {}, "a_lost_gpu_answers_nobody", "disconnected|ReadError"),
    ("E9", G.test_E9_an_error_of_cuda_ends_the_server_when_the_gpu_no_longer_computes, {}, "every_error_of_cuda_is_the_end", "503 == 500"),
    ("E9", G.test_E9_memory_of_the_gpu_that_runs_out_is_503_and_counted, {}, "memory_errors_are_like_others", "500 == 503"),
    ("E14", G.test_E14_each_refusal_has_its_reason_its_sentence_and_its_mend, {"words": "wrong=1", "asked": {}, "reason": "wrong_result", "said": ""}, "results_are_not_compared", "DID NOT RAISE"),
    ("E14", G.test_E14_memory_is_really_taken, {}, "memory_is_believed", "DID NOT RAISE"),
    ("E10", S.test_E10_a_killed_worker_is_replaced_and_five_times_in_a_minute_is_the_end, {}, "the_dead_are_not_replaced", HELD),
    ("E10", S.test_E10_a_killed_worker_is_replaced_and_five_times_in_a_minute_is_the_end, {}, "the_dead_are_replaced_for_ever", HELD),
    ("E11", B.test_E11_the_wall_clock_may_jump, {"jump": 3600}, "deadlines_by_the_wall_clock", "done"),
    ("E11", S.test_E11_a_log_that_nobody_reads_stops_nothing, {}, "a_line_waits_for_its_reader", "not ready"),
    ("E12", X.test_E12_whatever_a_handler_raises_is_one_500, {"deed": 0, "before": True}, "what_is_no_exception_of_a_handler_is_passed_on", "internal error|disconnected"),
    ("E12", X.test_E12_a_long_sentence_of_a_handler_is_cut_to_a_kilobyte, {}, "an_error_of_any_length", "1024"),
    ("E12", X.test_E12_a_handler_that_ends_its_process_is_a_crash_and_is_replaced, {"deed": "exit 0", "how": "code 0"}, "every_end_with_a_code_is_meant", "ready|None"),
    ("E12", X.test_E12_five_deaths_name_what_killed_the_last, {}, "every_end_with_a_code_is_meant", "SIGSEGV"),
    ("E12", X.test_E12_a_death_while_it_stops_is_not_exit_0, {}, "every_end_with_a_code_is_meant", "0 == 75"),
    ("E12", X.test_E12_what_a_handler_changes_for_everybody_disturbs_nobody, {"deed": "stderr"}, "lines_go_wherever_stderr_goes", "still hears"),
    ("E12", X.test_E12_what_a_handler_changes_for_everybody_disturbs_nobody, {"deed": "stop child"}, "a_child_keeps_what_its_parent_had", "refused|Error|assert"),
    ("E12", X.test_E12_eight_handlers_that_hang_starve_nobody, {}, "handlers_take_the_threads_of_large_bodies", "timed out|disconnected"),
    ("E12", X.test_E12_eight_handlers_that_hang_starve_nobody, {}, "a_stuck_handler_is_left_alone", HELD),
    ("E12", X.test_E12_one_that_hangs_is_told_504_at_its_own_deadline, {}, "a_handler_has_no_deadline", "timed out"),
    ("E12", X.test_E12_a_child_of_a_handler_keeps_no_port_and_no_connection, {}, "a_child_keeps_what_its_parent_had", "holds no client|timed out|already in use"),
    ("E13", X.test_E13_a_pause_of_the_whole_server_is_no_hang_and_costs_nobody_an_answer, {"seconds": 4}, "a_pause_is_taken_for_a_hang", "refused|200|408|NoneType|reset"),
    ("E13", X.test_E13_a_pause_of_the_whole_server_is_no_hang_and_costs_nobody_an_answer, {"seconds": 4}, "connections_are_late_after_a_pause", "408|NoneType|reset|Broken"),
    ("E13", X.test_E13_a_long_request_runs_in_turns_with_others_and_is_no_hang, {"rows": 100_000}, "a_long_request_is_one_batch", HELD + "|reset|Error"),
    ("E13", X.test_E13_of_a_long_request_that_nobody_waits_for_no_more_is_run, {"how": "client gone"}, "nobody_hears_a_client_leave", "only proofs"),
    ("L8", X.test_L8_from_ready_on_nothing_is_opened, {}, "nothing_is_asked_before_ready", "openat|timed out"),
    ("L8", X.test_L8_under_a_limit_of_processes_it_is_able_or_never_ready, {"most": 8}, "threads_start_with_the_first_request", "assert"),
    ("L8", H.test_L8_under_a_limit_of_open_files_it_is_able_or_never_ready, {}, "open_files_are_not_counted", HELD + "|70 == 7"),
    ("L1", S.test_L1_while_it_loads_it_lives_and_is_not_ready, {}, "ready_while_it_loads", r"\(200, 503\)|\(503, 503\)"),
    ("L2", S.test_L2_a_load_that_fails_ends_with_its_code, {}, "the_digest_is_not_compared", HELD),
    ("L2", S.test_L2_a_wrong_setting_or_argument_ends_with_2, {}, "unknown_settings_are_passed_over", HELD),
    ("L3", S.test_L3_a_stop_under_load_loses_no_answer, {"kind": "process 1", "share": 1, "stops": 1}, "connections_end_with_the_signal", "lost"),
    ("L3", S.test_L3_a_client_that_had_an_answer_just_now_may_ask_once_more, {}, "who_is_idle_in_the_drain_is_closed_at_once", "lost"),
    ("L3", S.test_L3_in_the_drain_delay_it_serves_and_is_not_ready, {}, "the_port_closes_before_the_drain", "refused"),
    ("L4", S.test_L4_after_the_grace_the_client_is_told_and_the_exit_code_is_75, {}, "the_grace_has_no_end", "disconnected|ReadError"),
    ("L4", S.test_L4_a_model_that_holds_the_lock_cannot_keep_the_process, {}, "the_parent_waits_for_ever", HELD),
    ("L5", S.test_L5_a_signal_during_the_load_ends_it_at_once, {}, "a_signal_waits_for_the_load", HELD),
    ("L5", S.test_L5_a_second_signal_does_not_wait, {}, "a_second_signal_is_not_heard", HELD),
    ("L5", S.test_L5_a_killed_parent_leaves_no_worker_and_its_port_is_free, {}, "a_worker_outlives_its_parent", HELD),
    ("A2", I.test_A2_a_row_that_depends_on_its_company_is_refused, {"name": "over the batch", "rows": 1}, "rows_are_asked_beside_rows_like_theirs", "DID NOT RAISE"),
    ("A2", I.test_A2_requests_whose_rows_belong_together_are_never_joined_and_never_cut, {}, "requests_are_always_joined", "wholes"),
    ("A2", I.test_A2_recorded_rows_are_asked_in_the_calls_of_the_reference, {}, "recorded_rows_are_asked_by_thirty_two", "held-back"),
    ("A3", I.test_A3_a_model_that_works_in_place_changes_no_array_of_anybody, {"format": "torchscript"}, "memory_is_shared_with_the_model", "before|otherwise|differ"),
    ("A3", I.test_A3_an_answer_is_not_overwritten_by_the_next, {}, "memory_is_shared_with_the_model", "first == 1"),
    ("A3", I.test_A3_a_model_that_writes_to_what_it_keeps_is_refused, {}, "writes_of_the_model_are_not_counted", "DID NOT RAISE"),
    ("A3", I.test_A3_what_a_model_keeps_beside_its_buffers_is_refused, {"name": "Smooth", "batch": False}, "nobody_asks_anything_else", "DID NOT RAISE"),
    ("A3", I.test_A3_an_answer_that_json_cannot_carry_is_refused_at_save, {"word": "-Infinity"}, "what_is_no_number_is_saved", "DID NOT RAISE"),
    ("A3", I.test_A3_what_the_package_says_is_an_answer_is_a_word_on_every_route, {}, "what_is_no_number_is_null", "null"),
    ("A3", V.test_A3_a_file_keeps_the_order_of_its_arrays, {}, "arrays_come_back_in_the_order_of_the_alphabet", "aux"),
    ("A3", V.test_A3_the_output_that_the_labels_belong_to_is_measured, {"case": "scores before aux"}, "the_first_output_of_the_alphabet_is_measured", "aux"),
    ("A3", V.test_A3_what_cannot_be_known_is_asked_for, {"outputs": V.TWO_HEADS, "labels": V.Y, "words": ["target"]}, "the_first_output_of_the_alphabet_is_measured", "DID NOT RAISE"),
    ("A3", V.test_A3_what_cannot_be_known_is_asked_for, {"outputs": {"class_weights": V.OTHER, "out": V.RIGHT}, "labels": V.Y, "words": ["target"]}, "an_output_of_a_known_name_is_taken", "DID NOT RAISE"),
    ("A3", V.test_A3_whole_numbers_are_compared_without_rounding, {"answers": V.WIDE.astype("uint64") + 1}, "whole_numbers_are_compared_as_floats", "1.0 == "),
    ("W11", test_lite.test_W11_a_custom_operator_is_refused_before_the_runtime_sees_it, {}, "custom_operators_are_taken", "unresolved custom op"),
]


def end_all(mark):
    "Kill every process that was started with this mark, orphans too"
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


@pytest.fixture
def planted(monkeypatch):
    "Plant a bug here and in every server that is started, and wait less; the mark is in the environment of all that is started"
    mark = uuid.uuid4().hex

    def plant(name):
        monkeypatch.setattr(servers, "PLANTED", {"FAKE_PLANT": name, "FAKE_RUN": mark})
        monkeypatch.setattr(servers, "HASTE", [5])
        monkeypatch.setenv("FAKE_PLANT", name)
        monkeypatch.setenv("FAKE_RUN", mark)
        mutations.sow(name, monkeypatch.setattr)
    yield plant
    end_all(mark)


def failure(test, stack, double, tmp_path, monkeypatch, given):
    "Run a test with what its fixtures would give it: how it failed, and the lines of the test that did"
    def crowded():
        made = Q.crowded(double, tmp_path)
        stack.enter_context(made.server)
        return made
    ready = {"double": lambda: double, "tmp_path": lambda: tmp_path, "monkeypatch": lambda: monkeypatch,
             "project": lambda: stack.enter_context(test_local_code.project_in(tmp_path, monkeypatch)),
             "place": lambda: test_python.place_in(tmp_path),
             "pool": lambda: stack.enter_context(concurrent.futures.ThreadPoolExecutor(64)),
             "server": lambda: stack.enter_context(servers.Server(double, tmp_path, **inspect.getmodule(test).SETTINGS)),
             "http": lambda: stack.enter_context(httpx.Client(base_url=ready["conformance"]().url, timeout=30, trust_env=False)),
             "lib": lambda: G.load(G.build(tmp_path), monkeypatch), "on_gpu": lambda: stack.enter_context(G.serving_on(G.build(tmp_path), double, tmp_path)),
             "ragged": lambda: test_ragged.saved_in(tmp_path),
             "own": crowded, "few": crowded,
             "collected_never": lambda: stack.enter_context(L.without_collector(double, tmp_path)),
             "conformance": lambda: stack.enter_context(servers.Server(double, tmp_path, **C.SETTINGS))}
    wanted = {n: given[n] if n in given else ready[n]() for n in inspect.signature(test).parameters}
    with pytest.raises((Exception, pytest.fail.Exception)) as caught:
        test(**wanted)
    lines = [f.line for f in traceback.extract_tb(caught.tb) if TESTS in Path(f.filename).parents]
    return f"{caught.typename}: {caught.value}\n" + "\n".join(lines[1:])


def name_of(row, test, given, plant, words):
    return f"{row}-{plant}-{test.__name__[5:40]}"


@pytest.mark.parametrize("row, test, given, plant, words", CONTROLS, ids=[name_of(*c) for c in CONTROLS])
def test_with_its_bug_planted_the_test_fails(row, test, given, plant, words, planted, double, tmp_path, monkeypatch):
    with contextlib.ExitStack() as stack:
        planted(plant)
        said = failure(test, stack, double, tmp_path, monkeypatch, given)
    assert re.search(words, said), f"it failed for another reason: {said[:2000]}"


def test_every_plant_is_used():
    text = "".join(p.read_text() for p in TESTS.rglob("test_*.py"))
    assert not [p for p in mutations.MUTATIONS if f'"{p}"' not in text]
