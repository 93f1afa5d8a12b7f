"""The wire formats: what is valid comes through bit for bit, what is not is refused by the right class, and nothing grows.

A twentieth of the full counts runs here; `pytest -m soak` runs them all, in a process with `MLSERVE_SOAK=1`.
"""
import base64
import csv
import gzip
import io
import itertools
import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import orjson
import pytest
from commands import TESTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlserve import tensors
from mlserve.wire.json_body import inflate
from mlserve.errors import InvalidInput, ModelFailed, TooLarge, UnsupportedMedia
from mlserve.wire.predict import InferRequest, decode_predict, decode_predict_response, encode_predict, encode_predict_request, named_arrays
from mlserve.wire.v2 import (answer_infer, decode_infer, decode_infer_response, encode_infer_binary,
                              encode_infer_request, encode_infer_request_binary)
from mlserve.wire.rows import from_csv, from_lines, to_csv, to_lines
from mlserve.wire.scoring import answer_instances, decode_instances, decode_invocations, encode_invocations
from mlserve.tensors import DATATYPES, TensorSpec, objects, spec_of

FULL = os.environ.get("MLSERVE_SOAK") == "1"
REFUSALS = (InvalidInput, TooLarge, UnsupportedMedia)


def times(full):
    "How many cases to run: all of them in a soak, else a twentieth"
    return full if FULL else max(1, full // 20)


def cases(full):
    "Settings for so many cases, the same ones each time"
    return settings(max_examples=times(full), deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much])


# ---------------------------------------------------------------- what is valid comes through

def values(datatype):
    if datatype == "BYTES":
        return st.text(max_size=12).map(str.encode)
    if datatype.startswith("FP"):
        return hnp.from_dtype(DATATYPES[datatype], allow_nan=False, allow_infinity=False)
    return hnp.from_dtype(DATATYPES[datatype])


@st.composite
def array(draw, rows=None, datatypes=tuple(DATATYPES)):
    datatype = draw(st.sampled_from(datatypes))
    shape = (rows or draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 4), max_size=2)))
    if datatype == "BYTES":
        return draw(hnp.arrays(object, shape, elements=values(datatype), fill=st.nothing()))
    return draw(hnp.arrays(DATATYPES[datatype], shape, elements=values(datatype)))


@st.composite
def batch(draw, datatypes=tuple(DATATYPES)):
    rows = draw(st.integers(1, 4))
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=3, unique=True))
    return {n: draw(array(rows, datatypes)) for n in names}


WITHOUT_HALF = tuple(d for d in DATATYPES if d != "FP16")


def specs(arrays):
    return tuple(spec_of(n, a) for n, a in arrays.items())


def same(got, expected):
    assert set(got) == set(expected)
    for n, a in expected.items():
        assert got[n].dtype == a.dtype and got[n].shape == a.shape, n
        assert got[n].tolist() == a.tolist() if a.dtype == object else got[n].tobytes() == a.tobytes(), n


@cases(4000)
@given(batch())
def test_plain_round_trip(arrays):
    same(decode_predict(encode_predict_request(arrays), specs(arrays)).inputs, arrays)
    same(decode_predict_response(encode_predict(arrays), specs(arrays)), arrays)


@cases(4000)
@given(batch(WITHOUT_HALF), st.none() | st.text(max_size=8))
def test_v2_json_round_trip(arrays, id):
    got = decode_infer(encode_infer_request(arrays, id=id), specs(arrays), specs(arrays))
    same(got.inputs, arrays)
    assert got.id == id and got.binary == ()
    same(decode_infer_response(answer_infer(got, arrays, "m", "1")[0]), arrays)


@cases(4000)
@given(batch(), st.randoms(use_true_random=False))
def test_v2_binary_round_trip(arrays, chance):
    body, header = encode_infer_request_binary(arrays)
    got = decode_infer(body, specs(arrays), specs(arrays), header=str(header))
    same(got.inputs, arrays)
    assert set(got.binary) == set(arrays)
    answer, length = answer_infer(got, arrays, "m", "1")
    same(decode_infer_response(answer, str(length)), arrays)
    some = [n for n in arrays if chance.random() < 0.5 or arrays[n].dtype == np.float16]
    same(decode_infer_response(*[f(v) for f, v in zip((bytes, str), encode_infer_binary(arrays, "m", "1", binary=some))]), arrays)


@cases(4000)
@given(batch(), st.booleans())
def test_v1_and_mlflow_round_trip(arrays, by_row):
    columns = {n: objects([v.decode() for v in a.flat], a.shape).tolist() if a.dtype == object else a.tolist() for n, a in arrays.items()}
    rows = [dict(zip(columns, r)) for r in zip(*columns.values())]
    body = orjson.dumps({"instances": rows} if by_row else {"inputs": columns})
    got = decode_instances(body, specs(arrays))
    same(got.inputs, arrays)
    same(decode_invocations(body, specs(arrays)).inputs, arrays)
    key, back = ("predictions", "instances") if by_row else ("outputs", "inputs")
    answer = json.loads(answer_instances(got, arrays))[key]
    same(decode_instances(orjson.dumps({back: answer}), specs(arrays)).inputs, arrays)
    same(decode_instances(orjson.dumps({"inputs": json.loads(encode_invocations(arrays))["predictions"]}), specs(arrays)).inputs, arrays)


@cases(2000)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=values("FP32")))
def test_tables_and_csv_round_trip(rows):
    columns = [f"c{i}" for i in range(len(rows[0]))]
    spec = (TensorSpec("x", "FP32", (-1, len(columns))),)
    expected, rows = {"x": rows}, rows.tolist()
    same(decode_invocations(json.dumps({"dataframe_split": {"columns": columns, "data": rows}}).encode(), spec).inputs, expected)
    same(decode_invocations(json.dumps({"dataframe_records": [dict(zip(columns, r)) for r in rows]}).encode(), spec).inputs, expected)
    text = "\n".join(",".join(map(repr, r)) for r in rows).encode()
    same(decode_invocations(",".join(columns).encode() + b"\n" + text, spec, media="text/csv; header=present").inputs, expected)
    for body, media in ((text, "text/csv; header=absent"), (text, "text/csv"), (b"\n".join(map(orjson.dumps, rows)), "application/jsonlines"), (orjson.dumps(rows), "application/json")):
        same(decode_invocations(body, spec, media=media).inputs, expected)


FLAT = st.integers(1, 5).flatmap(lambda rows: st.lists(st.sampled_from(WITHOUT_HALF), min_size=1, max_size=3).flatmap(
    lambda kinds: st.fixed_dictionaries({f"c{i}": hnp.arrays(object if k == "BYTES" else DATATYPES[k], (rows,), elements=values(k), fill=st.nothing()) for i, k in enumerate(kinds)})))


@cases(4000)
@given(FLAT)
def test_V10_no_row_is_lost_or_invented_in_csv_and_json_lines(arrays):
    "What the server writes is what it reads, with a header and without, whatever the texts are; a text may be empty, hold a line's end, or be called like a column"
    lines = to_csv(arrays)
    head = ",".join(arrays).encode() + b"\n"
    first = next(csv.reader(io.StringIO(lines.decode(), newline="")))
    same(from_csv(lines, specs(arrays), header="absent"), arrays)
    same(from_csv(head + lines, specs(arrays)), arrays)
    if sorted(first) != sorted(arrays):
        same(from_csv(lines, specs(arrays)), arrays)
    same(from_lines(to_lines(arrays), specs(arrays)), arrays)


@cases(2000)
@given(array(datatypes=("BYTES",)), st.randoms(use_true_random=False))
def test_bytes_as_base64_are_the_same_bytes(words, chance):
    def written(v):
        return {"b64": base64.b64encode(v).decode()} if chance.random() < 0.5 else v.decode()
    nested = np.frompyfunc(written, 1, 1)(words).tolist()
    for body in ({"instances": nested}, {"inputs": nested}, {"inputs": {"w": nested}}, {"instances": [{"w": r} for r in nested]}):
        same(decode_instances(json.dumps(body).encode(), (spec_of("w", words),)).inputs, {"w": words})
    same(decode_invocations(json.dumps(nested).encode(), (spec_of("w", words),)).inputs, {"w": words})
    coded = [{"name": "w", "shape": list(words.shape), "datatype": "BYTES", "parameters": {"content_type": "base64"}, "data": [base64.b64encode(v).decode() for v in words.flat]}]
    same(decode_infer(json.dumps({"inputs": coded}).encode(), (spec_of("w", words),), ()).inputs, {"w": words})


@cases(2000)
@given(st.binary(max_size=3000), st.sampled_from(["gzip", "deflate"]), st.integers(0, 3000))
def test_inflate_gives_the_body_or_a_refusal(body, coding, limit):
    packed = gzip.compress(body) if coding == "gzip" else zlib.compress(body)
    if len(body) <= limit:
        assert inflate(packed, coding, limit) == body
    else:
        with pytest.raises(TooLarge):
            inflate(packed, coding, limit)
    for cut in (packed[:-1], packed + b"\0", body):
        with pytest.raises(REFUSALS):
            inflate(cut, coding, 4000)


@cases(20000)
@given(st.sampled_from([d for d in DATATYPES if d not in ("BYTES", "BOOL")]),
       st.lists(st.one_of(st.integers(-2**65, 2**65), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none(), st.text(max_size=2)), min_size=1, max_size=6))
def test_v3_a_number_is_exact_or_refused_never_wrapped(datatype, items):
    "Compared with Python's own numbers, which have no width; the quick way and the slow one must agree"
    spec, dtype = TensorSpec("x", datatype, (-1,)), DATATYPES[datatype]
    body = orjson.dumps({"inputs": [v if not isinstance(v, int) or -2**63 <= v < 2**64 else float(v) for v in items]})
    items = orjson.loads(body)["inputs"]
    fits = all(type(v) in ((int, float) if dtype.kind == "f" else (int,)) for v in items)
    with np.errstate(over="ignore"):
        fits = fits and all(np.isfinite(dtype.type(v)) if dtype.kind == "f" else np.iinfo(dtype).min <= v <= np.iinfo(dtype).max for v in items)
    try:
        got = decode_predict(body, (spec,)).inputs["x"]
    except InvalidInput:
        assert not fits, items
    else:
        assert fits, items
        assert got.tolist() == [dtype.type(v).item() for v in items]


# ---------------------------------------------------------------- what is not valid is refused

X, N, B, T, HALF = (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("n", "INT8", (-1,)), TensorSpec("b", "BOOL", (-1,)),
                    TensorSpec("t", "BYTES", (-1,)), TensorSpec("h", "FP16", (-1,)))
Y = (TensorSpec("y", "FP32", (-1, 2)),)


def v2(spec=X, header=None, tail=b"", **change):
    "A V2 request with one thing changed, as `decode_infer` takes it"
    entry = {"name": spec.name, "shape": [1, 2] if spec is X else [1], "datatype": spec.datatype, "data": [1, 2] if spec is X else [1]}
    top = {k: change.pop(k) for k in ("id", "parameters", "outputs", "inputs", "model_name", "model_version") if k in change}
    entry = {k: v for k, v in (entry | change).items() if v is not ...}
    head = json.dumps({"inputs": [entry]} | top).encode()
    return lambda limit=2**26: decode_infer(head + tail, (spec,), Y, limit, str(len(head)) if header == "right" else header)


def framed(size=8, tail=bytes(8), spec=X, shape=None, header="right"):
    "A binary V2 request whose sizes may lie"
    return lambda limit=2**26: _framed(size, tail, spec, shape, header, limit)


def _framed(size, tail, spec, shape, header, limit):
    entry = {"name": spec.name, "shape": shape or ([1, 2] if spec is X else [1]), "datatype": spec.datatype, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [entry]}).encode()
    return decode_infer(head + tail, (spec,), Y, limit, str(len(head)) if header == "right" else header)


def plain(text, spec=X):
    return lambda limit=2**26: decode_predict(text if isinstance(text, bytes) else text.encode(), (spec,), limit)


def v1(text, *spec):
    return lambda limit=2**26: decode_instances(text.encode(), spec or (X,), limit)


def invoked(text, *spec, media="application/json"):
    return lambda limit=2**26: decode_invocations(text.encode(), spec or (X,), limit, media)


def entries(n, key="inputs"):
    other = b'"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}], ' if key == "outputs" else b""
    body = b"{" + other + f'"{key}": '.encode() + orjson.dumps([{"name": f"i{i}"} for i in range(n)]) + b"}"
    return lambda limit=2**26: decode_infer(body, (X,), Y, limit)


MALFORMED = {
    # V1 broken JSON
    "V1-empty": plain(""), "V1-cut": plain('{"inputs": [[1,'), "V1-bad-utf8": plain(b'{"inputs": "\xff"}'), "V1-list": plain("[[1, 2]]"),
    "V1-number": plain("3"), "V1-null": plain("null"), "V1-nesting-120": plain('{"inputs": ' + "[" * 120 + "]" * 120 + "}"),
    "V1-nesting-250000": plain('{"inputs": ' + "[" * 250_000), "V1-nesting-objects": plain('{"inputs": ' * 1000 + "1" + "}" * 1000),
    "V1-5000-digits": plain('{"inputs": [[1, ' + "9" * 5000 + "]]}"), "V1-100000-inputs": entries(10**5), "V1-100000-outputs": entries(10**5, "outputs"),
    "V1-bom": plain(b"\xef\xbb\xbf{}"), "V1-utf16": plain('{"inputs": [[1, 2]]}'.encode("utf-16")), "V1-trailing": plain('{"inputs": [[1, 2]]} x'),
    # V2 shapes
    **{f"V2-shape-{name}": v2(TensorSpec("x", "FP32", (-1, -1)), shape=shape, data=[0.0] * 32) for name, shape in {
        "wraps": [2**4, 2**60 + 2], "negative": [-1, -32], "bool": [True, 32], "float": [1.0, 32], "string": "32", "list-string": ["1", 32],
        "thousand": [1] * 1000, "zero": [0, 32], "null": None, "object": {}, "empty": [], "huge": [2**63, 1]}.items()},
    "V2-binary-shape-wraps": framed(128, bytes(128), TensorSpec("x", "FP32", (-1, -1)), [2**4, 2**60 + 2]),
    # V3 values
    "V3-300-uint8": plain('{"inputs": [300]}', TensorSpec("x", "UINT8", (-1,))), "V3-128-int8": plain('{"inputs": [128]}', N),
    "V3-2**63-int64": plain(f'{{"inputs": [{2**63}]}}', TensorSpec("x", "INT64", (-1,))), "V3-2**64-uint64": plain(f'{{"inputs": [{2**64}]}}', TensorSpec("x", "UINT64", (-1,))),
    "V3-negative-uint64": plain('{"inputs": [-1]}', TensorSpec("x", "UINT64", (-1,))),
    "V3-1e39-fp32": plain('{"inputs": [[1, 1e39]]}'), "V3-1e400-fp32": plain('{"inputs": [[1, 1e400]]}'), "V3-70000-fp16": plain('{"inputs": [70000]}', HALF),
    "V3-true-int": plain('{"inputs": [true]}', N), "V3-true-fp32": plain('{"inputs": [[1, true]]}'), "V3-1-bool": plain('{"inputs": [1]}', B),
    "V3-float-int": plain('{"inputs": [1.0]}', N), "V3-text-number": plain('{"inputs": [["1", "2"]]}'), "V3-null": plain('{"inputs": [[null, 1]]}'),
    "V3-number-bytes": plain('{"inputs": [1]}', T), "V3-binary-bool-2": framed(1, b"\2", B),
    # V4 names and types
    "V4-datatype": v2(datatype="FP64"), "V4-datatype-case": v2(datatype="fp32"), "V4-bf16": v2(datatype="BF16"), "V4-datatype-list": v2(datatype=["FP32"]),
    "V4-shape": v2(shape=[2, 1]), "V4-rank": v2(shape=[2]), "V4-name": v2(name="z"), "V4-name-case": v2(name="X"), "V4-name-number": v2(name=1), "V4-name-gone": v2(name=...),
    "V4-no-data": v2(data=...), "V4-no-shape": v2(shape=...), "V4-no-datatype": v2(datatype=...), "V4-unknown-key": v2(dtype="FP32"),
    "V4-inputs-object": v2(inputs={}), "V4-inputs-gone": v2(inputs=[]), "V4-inputs-null": v2(inputs=None), "V4-input-number": v2(inputs=[1]),
    "V4-input-twice": v2(inputs=[{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}] * 2),
    "V4-output-unknown": v2(outputs=[{"name": "q"}]), "V4-output-twice": v2(outputs=[{"name": "y"}] * 2), "V4-output-number": v2(outputs=[1]), "V4-outputs-object": v2(outputs={"y": 1}),
    "V4-output-parameters": v2(outputs=[{"name": "y", "parameters": 1}]), "V4-output-binary-text": v2(outputs=[{"name": "y", "parameters": {"binary_data": "true"}}]),
    "V4-classification-zero": v2(outputs=[{"name": "y", "parameters": {"classification": 0}}]), "V4-classification-true": v2(outputs=[{"name": "y", "parameters": {"classification": True}}]),
    "V4-shared-memory": v2(parameters={"shared_memory_region": "r"}), "V4-sequence": v2(parameters={"sequence_id": 7}), "V4-parameters-list": v2(parameters=[]),
    "V4-timeout-text": v2(parameters={"timeout": "1"}), "V4-timeout-negative": v2(parameters={"timeout": -1}), "V4-timeout-true": v2(parameters={"timeout": True}),
    "V4-id-number": v2(id=7), "V4-model-number": v2(model_name=7), "V4-version-list": v2(model_version=["1"]), "V4-fp16-json": v2(HALF),
    "V4-duplicate-key": plain('{"inputs": [[1, 2]], "inputs": [[3, 4]]}'), "V4-duplicate-escaped": plain('{"inputs": [[1, 2]], "\\u0069nputs": [[3, 4]]}'),
    "V4-duplicate-nested": plain('{"inputs": {"x": [[1, 2]], "x": [[3, 4]]}}'), "V4-duplicate-and-colon": plain('{"inputs": {"x": [["a:b", 2]], "x": [[3, 4]]}}'),
    "V4-plain-missing": plain("{}"), "V4-plain-unknown": plain('{"inputs": {"z": [[1, 2]]}}'), "V4-plain-extra": plain('{"inputs": {"x": [[1, 2]], "z": 1}}'),
    "V4-instances-two-names": v1('{"instances": [{"x": [1, 2]}, {"x": [1, 2], "z": 1}]}'), "V4-instances-fewer": v1('{"instances": [{"x": [1, 2], "n": 1}, {"x": [1, 2]}]}', X, N),
    "V4-instances-mixed": v1('{"instances": [{"x": [1, 2]}, [1, 2]]}'), "V4-instances-object": v1('{"instances": {"x": [[1, 2]]}}'), "V4-instances-and-inputs": v1('{"instances": [[1, 2]], "inputs": [[1, 2]]}'),
    "V4-instances-none": v1("{}"), "V4-instances-empty": v1('{"instances": []}'), "V4-signature": v1('{"instances": [[1, 2]], "signature_name": "other"}'),
    "V4-invocations-two": invoked('{"instances": [[1, 2]], "inputs": [[1, 2]]}'), "V4-invocations-none": invoked('{"params": {}}'), "V4-invocations-params": invoked('{"inputs": [[1, 2]], "params": [1]}'),
    "V4-split-columns-twice": invoked('{"dataframe_split": {"columns": ["a", "a"], "data": [[1, 2]]}}'), "V4-split-ragged": invoked('{"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2], [3]]}}'),
    "V4-split-no-data": invoked('{"dataframe_split": {"columns": ["a", "b"]}}'), "V4-records-differ": invoked('{"dataframe_records": [{"a": 1, "b": 2}, {"a": 1, "c": 2}]}'),
    "V4-csv-width": invoked("1,2\n1,2,3", media="text/csv"), "V4-csv-type": invoked("a,b", media="text/tsv"), "V4-codec": v2(parameters={"content_type": "datetime"}),
    "V4-codec-of-input": v2(T, parameters=None, data=["a"], inputs=[{"name": "t", "shape": [1], "datatype": "BYTES", "data": ["a"], "parameters": {"content_type": "hg_json"}}]),
    "V4-codec-of-type": v2(inputs=[{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2], "parameters": {"content_type": "base64"}}]),
    "V4-codec-output": v2(outputs=[{"name": "y", "parameters": {"content_type": "base64"}}]), "V4-b64-number": v1('{"instances": [{"b64": "AAAA"}]}', N),
    "V4-b64-text": v1('{"instances": [{"b64": "not base64"}]}', T), "V4-b64-and-more": v1('{"instances": [{"b64": "AAAA", "t": "a"}]}', T), "V4-b64-deep": v1('{"instances": ' + '[' * 900 + '{"b64": ""}' + ']' * 900 + "}", T),
    **{f"V10-csv-{name}": invoked(text, *spec, media="text/csv") for name, (text, *spec) in {"features": ("a,b\n1,2",), "half-a-header": ("x,2\n3,4",), "empty-line": ("1,2\n\n3,4",),
        "empty-line-of-text": ("one\n\nthree", T), "other-names": ("t,m\na,1", T, N), "empty-cell": ("1,2\n3,", X), "only-a-header": ("t,n\n", T, N)}.items()},
    **{f"V10-lines-{name}": invoked(text, media="application/jsonlines") for name, text in {"empty": "", "empty-line": "[1, 2]\n\n[3, 4]", "two-on-a-line": "[1, 2], [3, 4]",
        "across": "[1\n2], [3, 4]", "key-twice": '{"x": [1, 2], "x": [3, 4]}', "another-key": '{"x": [1, 2]}\n{"x": [1, 2], "z": 1}', "closed-early": '[1, 2]}\n{"z": [3, 4]'}.items()},
    **{f"V10-list-{name}": invoked(text) for name, text in {"open": "[[1, 2]", "and-a-key": '[[1, 2]], "params": {}', "and-more": "[[1, 2]] [[3, 4]]", "row": "[1, 2]", "empty": "[]",
        "key-twice": '[{"x": [1, 2], "x": [3, 4]}]'}.items()},
    **{f"V3-csv-{name}": invoked("a,b\n" + row, media="text/csv; header=present") for name, row in {"nan": "1,nan", "empty-cell": "1,", "two-in-one": '"1,2",3\n', "list": '"1],[2",3\n',
        "underscore": "1_0,2", "true": "true,2", "text": '"""a""",2'}.items()},
    "V4-rows-differ": lambda limit=2**26: decode_predict(b'{"inputs": {"x": [[1, 2]], "n": [1, 2]}}', (X, N)),
    # V5 literals
    "V5-nan": plain('{"inputs": [[NaN, 1]]}'), "V5-infinity": plain('{"inputs": [[Infinity, 1]]}'), "V5-minus-infinity": plain('{"inputs": [[-Infinity, 1]]}'),
    "V5-surrogate-id": v2(id="\ud800"), "V5-surrogate-bytes": plain('{"inputs": ["\\ud800"]}', T),
    # V6 growth
    "V6-int8-as-fp64": lambda limit=1000: decode_predict(b'{"inputs": [' + b",".join([b"1"] * 126) + b"]}", (TensorSpec("x", "FP64", (-1,)),), 1000),
    "V6-texts": lambda limit=1000: decode_predict(b'{"inputs": [' + b",".join([b'""'] * 100) + b"]}", (T,), 1000),
    "V6-v2": lambda limit=1000: v2(TensorSpec("x", "FP64", (-1,)), shape=[126], data=[1] * 126)(1000),
    "V6-binary": lambda limit=1000: framed(1008, bytes(1008), TensorSpec("x", "FP64", (-1,)), [126])(1000),
    "V6-binary-texts": lambda limit=1000: framed(400, bytes(400), T, [100])(1000),
    "V6-gzip-bomb": lambda limit=1000: inflate(gzip.compress(bytes(10**7)), "gzip", 1000),
    "V6-coding": lambda limit=1000: inflate(b"x", "br", 1000), "V6-coding-twice": lambda limit=1000: inflate(b"x", "gzip, gzip", 1000),
    # V7 lies about sizes
    **{f"V7-header-{h[:12]!r}": framed(8, bytes(8), header=h) for h in ["-1", "+5", "abc", "", "2, 2", "99999999999", "9" * 5000, "1.0", "0x10", "٣", " 9", "1_0", "\0", "1", "50"]},
    "V7-header-in-character": lambda limit=0: decode_infer('{"inputs": [], "id": "ж"}'.encode(), (X,), Y, header="23"),
    "V7-header-none": framed(8, bytes(8), header=None), "V7-header-zero-size": framed(8, bytes(8), header="0"),
    "V7-size-small": framed(7, bytes(7)), "V7-size-large": framed(9, bytes(9)), "V7-size-beyond": framed(9, bytes(8)), "V7-size-huge": framed(2**63, bytes(8)),
    "V7-size-short": framed(8, bytes(9)), "V7-size-negative": framed(-8, bytes(8)), "V7-size-bool": framed(True, bytes(1)), "V7-size-text": framed("8", bytes(8)),
    "V7-size-float": framed(8.0, bytes(8)), "V7-tail-of-json": v2(header="right", tail=b"x"),
    "V7-data-and-size": lambda limit=0: v2(header="right", tail=bytes(8), inputs=[{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2], "parameters": {"binary_data_size": 8}}])(),
    "V7-text-long": framed(5, b"\2\0\0\0a", T), "V7-text-4-GiB": framed(5, b"\xff\xff\xff\xffa", T), "V7-text-cut": framed(3, b"\1\0\0", T),
    "V7-text-more": framed(6, b"\1\0\0\0ab", T), "V7-text-count": framed(4, bytes(4), T, [2]), "V7-text-2**60": framed(4, bytes(4), T, [2**60]),
    "V7-raw-two-inputs": lambda limit=0: decode_infer(bytes(8), (X, N), Y, header="0"),
    "V7-raw-two-free": lambda limit=0: decode_infer(bytes(8), (TensorSpec("x", "FP32", (-1, -1, -1)),), Y, header="0"),
    "V7-raw-empty": lambda limit=0: decode_infer(b"", (TensorSpec("x", "FP32", (-1, -1)),), Y, header="0"),
    "V7-raw-odd": lambda limit=0: decode_infer(bytes(7), (TensorSpec("x", "FP32", (-1, -1)),), Y, header="0"),
}
EXPECTED = {**{k: TooLarge for k in MALFORMED if k.startswith("V6")}, "V4-csv-type": UnsupportedMedia, "V6-coding": UnsupportedMedia, "V6-coding-twice": UnsupportedMedia}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name):
    with pytest.raises(EXPECTED.get(name, InvalidInput)) as caught:
        MALFORMED[name]()
    text = caught.value.message
    assert 10 < len(text) <= 700 and not any(c in text for c in "\n\r\0") and "Traceback" not in text and "/work" not in text
    text.encode()


def test_nul_in_bytes_is_data():
    assert decode_predict(b'{"inputs": ["a\\u0000b"]}', (T,)).inputs["t"].tolist() == [b"a\0b"]
    assert encode_predict({"t": objects([b"a\0b", b"\0"], (2,))}) == b'{"outputs":["a\\u0000b","\\u0000"]}'


def test_v6_is_refused_before_anything_is_built():
    parsed = orjson.loads(b"[[" + b",".join([b"1"] * 10**6) + b"]]")
    tracemalloc.start()
    with pytest.raises(TooLarge):
        named_arrays(parsed, (TensorSpec("x", "FP64", (-1, -1)),), 2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20, "nothing is built beside the parsed JSON"


def test_v6_a_bomb_is_not_inflated_beyond_the_limit():
    bomb = gzip.compress(bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(TooLarge):
        inflate(bomb, "gzip", 2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_malformed_bodies_leave_nothing_behind():
    run = [f for n, f in MALFORMED.items() if "100000" not in n and "250000" not in n]

    def again(rounds):
        for _ in range(rounds):
            for f in run:
                try:
                    f()
                except REFUSALS:
                    pass
    again(10)
    tracemalloc.start()
    again(5)
    before = tracemalloc.get_traced_memory()[0]
    again(times(100))
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 2**18, f"{grown} bytes after {times(100)} rounds of {len(run)} malformed bodies"


# ---------------------------------------------------------------- fuzz: any bytes, one of our refusals

def decoders(data, number):
    "One decoder with its arguments, picked by a number"
    both = (X, T)
    header = [None, "0", str(number % (len(data) + 2)), str(len(data))][number % 4]
    return [lambda: decode_predict(data, (X,), 2**20), lambda: decode_predict(data, both, 2**20), lambda: decode_infer(data, (X,), Y, 2**20, header),
            lambda: decode_infer(data, both, Y, 2**20, header), lambda: decode_infer(data, (T,), Y, 2**20, header), lambda: decode_instances(data, both, 2**20),
            lambda: decode_invocations(data, (X,), 2**20), lambda: decode_invocations(data, both, 2**20, "text/csv; header=present"),
            lambda: decode_invocations(data, (X,), 2**20, "text/csv"), lambda: inflate(data, "gzip", 2**20), lambda: inflate(data, "deflate", 2**20),
            lambda: decode_invocations(data, both, 2**20, "application/jsonlines"), lambda: decode_invocations(data, (T, N), 2**20, "text/csv"),
            lambda: decode_invocations(data, both, 2**20), lambda: decode_invocations(data, (T,), 2**20, "text/csv")][number % 15]


def refuse_or_meet(decode):
    "Run a decoder: a refusal of ours, or arrays that meet the contract"
    try:
        got = decode()
    except REFUSALS as e:
        assert len(e.message) < 1000
        e.message.encode()
        return False
    if isinstance(got, InferRequest):
        known = {s.name: s for s in (X, N, B, T, HALF)}
        tensors.check_tensors(got.inputs, [known[n] for n in got.inputs])
    return True


def corpus():
    "Valid bodies of every format, to be damaged"
    x, t = np.array([[1.5, -2]], np.float32), objects([b"word"], (1,))
    one, two = encode_infer_request_binary({"x": x}, ["y"], "7", 1.0), encode_infer_request_binary({"x": x, "t": t})
    return [(encode_predict_request({"x": x}), 0, None), (encode_predict_request({"x": x, "t": t}), 1, None), (encode_infer_request({"x": x}, ["y"], "7", 1.0), 2, None),
            (one[0], 2, one[1]), (two[0], 3, two[1]), (encode_infer_request_binary({"t": t})[0], 4, encode_infer_request_binary({"t": t})[1]),
            (b'{"instances": [{"x": [1, 2], "t": "a"}]}', 5, None), (b'{"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2]]}}', 6, None),
            (b'{"dataframe_records": [{"x": [1, 2], "t": "a"}]}', 6, None), (b"1,2\n3,4\n", 8, None), (b'[{"x": [1, 2], "t": {"b64": "AA=="}}]', 13, None), (b'{"x": [1, 2], "t": "a"}\n{"x": [3, 4], "t": {"b64": "AA=="}}\n', 11, None), (b"t,n\na,1\n\"b,\",2\n", 12, None),
            (b'{"model_name": "m", "parameters": {"content_type": "np"}, "inputs": [{"name": "t", "datatype": "BYTES", "shape": [1, 1], "parameters": {"content_type": "base64"}, "data": ["AA=="]}]}', 4, None), (gzip.compress(b"body" * 9), 9, None), (zlib.compress(b"body" * 9), 10, None)]


TOKENS = [b"{", b"}", b"[", b"]", b":", b",", b'"', b"null", b"true", b"1e999", b"-", b"\0", b"\xff", b"\\ud800", b'"x":', b"99999999999999999999", b"NaN", b"\n", b"binary_data_size"]


def damage(data, chance):
    "A body with one to three changes"
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0: data[at:at + 1] = bytes([chance.randrange(256)])
            case 1: data[at:at + chance.randint(1, 9)] = b""
            case 2: data[at:at] = chance.choice(TOKENS)
            case 3: data[at:at] = data[:at][-chance.randint(1, 20):]
            case 4: data[at:at + 4] = struct.pack("<I", chance.choice([0, 1, 2**31, 2**32 - 1, len(data)]))
    return bytes(data)


def test_damaged_bodies_are_refused_or_meet_the_contract():
    chance, bodies, passed = random.Random(7), corpus(), 0
    for i in range(times(200_000)):
        data, decoder, header = bodies[i % len(bodies)]
        data = damage(data, chance)
        if header is None:
            passed += refuse_or_meet(decoders(data, {2: 32, 3: 48}.get(decoder, decoder)))
        else:
            moved = str(max(0, header + chance.choice([0, 0, 0, -1, 1, 5])))
            call = {2: (X,), 3: (X, T), 4: (T,)}[decoder]
            passed += refuse_or_meet(lambda: decode_infer(data, call, Y, 2**20, moved))
    assert passed > times(200_000) // 60, "the damage is too heavy to reach the inner checks"


LONG = [(b'{"inputs": [%b], "id": "a"}', lambda b: decode_predict(b, (N,))), (b'{"inputs": {"x": [[%b]]}}', lambda b: decode_predict(b, (TensorSpec("x", "FP32", (-1, -1)),))),
        (b'{"x": "[1, \\\\\\"", "inputs": [[[%b]], [[%b]]]}', lambda b: decode_predict(b, (TensorSpec("x", "FP64", (-1, 1, -1)),))),
        (b'{"inputs": [{"name": "n", "datatype": "INT8", "shape": [40], "data": [%b]}], "outputs": [{"name": "y"}]}', lambda b: decode_infer(b, (N,), Y)),
        (b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [20, 2], "data": [[%b], [%b]], "parameters": {"content_type": "np"}}]}', lambda b: decode_infer(b, (X,), Y)),
        (b'{"instances": [[%b], [%b]]}', lambda b: decode_instances(b, (TensorSpec("x", "FP32", (-1, 20)),))), (b"[[%b], [%b]]", lambda b: decode_invocations(b, (TensorSpec("x", "FP32", (-1, 20)),)))]


def damaged_list(text, chance):
    "A long list with up to two changes, of the kind that its shape could hide"
    text = bytearray(text)
    for _ in range(chance.choice([0, 1, 1, 2])):
        at = chance.randrange(1, len(text))
        match chance.randrange(4):
            case 0: text[at - 1:at + 1] = text[at - 1:at + 1][::-1]
            case 1: text[at:at + chance.randint(1, 4)] = b""
            case 2: text[at:at] = chance.choice([*TOKENS, b"],[", b"[", b"]", b" ", b"1", b".5", b"{}"])
            case 3: text = bytearray(text.replace(b", ", b"], [", chance.randint(1, 3)))
    return bytes(text)


def test_V1_a_long_list_is_read_in_pieces_as_a_short_one_is_at_once(monkeypatch):
    from mlserve.wire import lists
    monkeypatch.setattr(lists, "_piece", 30)
    monkeypatch.setattr(lists, "_part", 7)
    read_long, taken, refused, chance = lists._read_long, 0, 0, random.Random(11)

    def counted(*args):
        nonlocal taken
        array = read_long(*args)
        taken += array is not None
        return array
    monkeypatch.setattr(lists, "_read_long", counted)
    for i in range(times(60_000)):
        form, decode = LONG[i % len(LONG)]
        numbers = [", ".join(chance.choice(["1", "-2", "3", "100", "-7"]) for _ in range(40 // max(1, form.count(b"%b")))).encode() for _ in range(form.count(b"%b"))]
        body, told = damaged_list(form % tuple(numbers), chance), []
        for long in (2**30, 40):
            monkeypatch.setattr(lists, "_long", long)
            try:
                told.append({n: (a.dtype, a.tolist()) for n, a in decode(body).inputs.items()})
            except REFUSALS as e:
                told.append(str(e))
        assert told[0] == told[1] or type(told[0]) is type(told[1]) is str, body  # of two faults either may be told
        refused += type(told[1]) is str
    assert taken > times(60_000) // 8 and refused > times(60_000) // 8, (taken, refused)


CELLS = [None, True, 0, 1, -1, 3.0, 2.5, 1e308, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -2**63, float("inf"), float("nan"), "", "Bern", "a\0b", "\ud800", [1], [2.5], ["x"], [], [1, 2], {}]


def test_V3_a_row_of_a_table_is_read_alone_as_in_company(monkeypatch):
    from mlserve.wire import predict
    quick, taken = predict._row, 0

    def counted(*args):
        nonlocal taken
        arrays = quick(*args)
        taken += arrays is not None
        return arrays

    def read(rows, limit=2**20):
        try:
            return {n: (a.dtype, a[:1].shape, str(a[:1].tolist())) for n, a in named_arrays(rows, specs, limit).items()}
        except REFUSALS as e:
            return type(e)
    monkeypatch.setattr(predict, "_row", counted)
    for datatype, optional in itertools.product(("FP64", "FP32", "INT64", "INT32", "UINT8", "BOOL", "BYTES"), (True, False)):
        specs = [TensorSpec("a", datatype, (-1, 1), optional), TensorSpec("b", "FP64", (-1, 1), False)]
        for cell in CELLS:
            for row in ({"a": cell, "b": 1}, {"b": 1.5, "a": cell}, {"b": 1}, {"a": cell}, {"a": cell, "b": 1, "c": 1}):
                assert read([row]) == read([row, row]), (datatype, optional, row)
        assert datatype != "BYTES" or read([{"a": "x", "b": 1}], 40) is TooLarge
    assert taken > 60, taken


@cases(20000)
@given(st.binary(max_size=200), st.integers(0, 2**16))
def test_any_bytes_are_refused_or_meet_the_contract(data, number):
    refuse_or_meet(decoders(data, number))


json_values = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=6),
                           lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
                               ["inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "binary_data_size", "columns", "x", "t", "id"]) | st.text(max_size=3), inner, max_size=4), max_leaves=20)


@cases(8000)
@given(st.dictionaries(st.sampled_from(["inputs", "outputs", "instances", "dataframe_split", "dataframe_records", "params", "id", "parameters", "signature_name"]), json_values, max_size=3),
       st.integers(0, 8))
def test_any_json_is_refused_or_meets_the_contract(value, number):
    refuse_or_meet(decoders(json.dumps(value).encode(), number))


@cases(10000)
@given(json_values, json_values)
def test_any_answer_is_read_or_is_the_models_failure(outputs, entry):
    for body in (json.dumps({"outputs": outputs}).encode(), json.dumps({"outputs": [entry]}).encode()):
        for read in (lambda: decode_infer_response(body), lambda: decode_predict_response(body, (X,))):
            try:
                read()
            except ModelFailed:
                pass


# ---------------------------------------------------------------- Triton's client

def triton_request(inputs, outputs=None, **kw):
    "Body and header as Triton's own client makes them"
    from tritonclient.http._utils import _get_inference_request
    defaults = dict(request_id="", sequence_id=0, sequence_start=False, sequence_end=False, priority=0, timeout=None, custom_parameters=None)
    body, header = _get_inference_request(inputs=inputs, outputs=outputs, **(defaults | kw))
    return bytes(body), None if header is None else str(header)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("datatype", list(DATATYPES))
def test_tritonclient_understands(datatype, binary):
    from tritonclient.http import InferInput, InferRequestedOutput, InferResult
    a = objects([b"a", "ж".encode(), b"c\0", b""], (2, 2)) if datatype == "BYTES" else np.array([[0, 1], [1, 1]]).astype(DATATYPES[datatype])
    spec = (spec_of("a", a),)
    given = InferInput("a", list(a.shape), datatype)
    given.set_data_from_numpy(a, binary_data=binary)
    body, header = triton_request([given], request_id="r1", timeout=1500)
    if datatype == "FP16" and not binary:
        with pytest.raises(InvalidInput, match="no JSON form"):
            decode_infer(body, spec, spec, header=header)
        return
    got = decode_infer(body, spec, spec, header=header)
    same(got.inputs, {"a": a})
    assert (got.id, got.timeout, got.binary) == ("r1", 0.0015, ("a",)), "without outputs Triton's client asks for all as binary"
    answer, length = answer_infer(got, {"a": a}, "m", "1")
    result = InferResult.from_response_body(answer, header_length=length)
    assert result.as_numpy("a").tolist() == a.tolist() and result.get_response()["id"] == "r1"
    if datatype != "FP16":
        body, header = triton_request([given], [InferRequestedOutput("a", binary_data=False)])
        answer, length = answer_infer(decode_infer(body, spec, spec, header=header), {"a": a}, "m", "1")
        assert length is None
        read = InferResult.from_response_body(answer, header_length=length).as_numpy("a").tolist()
        assert read == [[v.decode() for v in r] for r in a.tolist()] if datatype == "BYTES" else read == a.tolist()


def test_tritonclient_understands_classification():
    from tritonclient.http import InferInput, InferRequestedOutput, InferResult
    a = np.array([[0.5, 2, 1]], np.float32)
    spec = (spec_of("a", a),)
    given = InferInput("a", [1, 3], "FP32").set_data_from_numpy(a)
    body, header = triton_request([given], [InferRequestedOutput("a", class_count=2)])
    answer, length = answer_infer(decode_infer(body, spec, spec, header=header), {"a": a}, "m", "1")
    assert InferResult.from_response_body(answer, header_length=length).as_numpy("a").tolist() == [[b"2.000000:1", b"1.000000:2"]]


@pytest.mark.parametrize("change", [dict(sequence_id=5, sequence_start=True)])
def test_tritonclient_is_told_what_is_not_served(change):
    from tritonclient.http import InferInput
    given = InferInput("x", [1, 2], "FP32").set_data_from_numpy(np.zeros((1, 2), np.float32))
    body, header = triton_request([given], **change)
    with pytest.raises(InvalidInput, match="not served"):
        decode_infer(body, (X,), Y, header=header)
    shared = InferInput("x", [1, 2], "FP32")
    shared.set_shared_memory("region", 8)
    body, header = triton_request([shared])
    with pytest.raises(InvalidInput, match="not served"):
        decode_infer(body, (X,), Y, header=header)


# ---------------------------------------------------------------- the full counts, and the fuzzer

FUZZ = TESTS / "fuzz_binary.py"


def fuzz(runs, folder):
    "Run the coverage-guided fuzzer on the binary decoder; what it printed"
    # a shell between, as a child begins with the peak memory of its parent, which here is that of all tests before
    done = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", sys.executable, FUZZ, f"-runs={runs}", "-seed=7", "-max_len=512", "-rss_limit_mb=1024", "-timeout=5", f"-artifact_prefix={folder}/", folder],
                          capture_output=True, text=True, timeout=max(800, runs // 500))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Done {runs} runs" in done.stderr, done.stderr[-3000:]
    return done.stderr


def test_v7_fuzzed_binary_bodies_are_refused_or_meet_the_contract(tmp_path):
    fuzz(20_000, tmp_path)


@pytest.mark.soak
def test_v7_fuzzed_binary_bodies_in_full(tmp_path):
    fuzz(1_000_000, tmp_path)


@pytest.mark.soak
def test_the_full_counts():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", __file__, "-m", "not soak"], env=os.environ | {"MLSERVE_SOAK": "1"}, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-4000:]


def test_numbers_that_are_large_leave_no_warning_among_the_lines_of_the_log():
    code = "import numpy as np; from mlserve.tensors import finite; assert finite(np.full(9, 3e38, np.float32)); np.full(9, 3e38, np.float32).dot(np.full(9, 3e38, np.float32))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("RuntimeWarning") == 1, done.stderr  # that of a model is told as ever
