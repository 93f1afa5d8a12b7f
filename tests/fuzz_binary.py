"""Coverage-guided fuzzing of the binary decoder: any body is refused by our own classes, or gives arrays that meet the contract.

Run by `test_protocols.py`; alone: `python tests/fuzz_binary.py -runs=1000000 FOLDER`. The first byte picks the contract, the next two the header's length.
"""
import os
import sys

import atheris

with atheris.instrument_imports(include=["mlserve"]):
    from mlserve.wire import v2 as protocol
    from mlserve import tensors

from mlserve.errors import InvalidInput, TooLarge

if plant := os.environ.get("FAKE_PLANT"):  # a control: the fuzzer must find the bug
    import mutations
    mutations.sow(plant)

SPECS = [(tensors.TensorSpec("x", "FP32", (-1, 2)),), (tensors.TensorSpec("t", "BYTES", (-1,)),), (tensors.TensorSpec("b", "BOOL", (-1, -1)),),
         (tensors.TensorSpec("x", "FP16", (-1, 2)), tensors.TensorSpec("t", "BYTES", (-1, 1)))]
HEADS = [b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","parameters":{"binary_data_size":8}}]}', b'{"inputs":[{"name":"t","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":8}}]}',
         b'{"inputs":[{"name":"b","shape":[1,2],"datatype":"BOOL","parameters":{"binary_data_size":2}}]}',
         b'{"inputs":[{"name":"t","shape":[1,1],"datatype":"BYTES","parameters":{"binary_data_size":5}},{"name":"x","shape":[1,2],"datatype":"FP16","parameters":{"binary_data_size":4}}]}']


def one(data):
    "Decode one body in three ways"
    if len(data) < 3:
        return
    specs, head, rest = SPECS[data[0] % 4], HEADS[data[0] % 4], data[3:]
    length = str(int.from_bytes(data[1:3], "little") % (len(rest) + 2))
    for content, header in ((rest, length), (head + rest, str(len(head))), (rest, "0"), (rest, rest[:6].decode("latin-1"))):
        try:
            got = protocol.decode_infer(content, specs, specs, 2**20, header)
        except (InvalidInput, TooLarge):
            continue
        tensors.check_tensors(got.inputs, specs)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
