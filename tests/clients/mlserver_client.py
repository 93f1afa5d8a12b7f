"""MLServer's codecs make the requests and read the answers; `requests`' place is taken by httpx. Prints one JSON object."""
import json
import sys

import httpx
import numpy as np
import pandas as pd
from mlserver.codecs import Base64Codec, DatetimeCodec, NumpyCodec, NumpyRequestCodec, PandasCodec, StringCodec, StringRequestCodec
from mlserver.types import InferenceRequest, InferenceResponse, MetadataModelResponse, RequestOutput

NUMBERS, TEXTS = sys.argv[1:]  # paths of a model of numbers and of one of texts
http = httpx.Client(timeout=30, trust_env=False)


def ask(url, request, dump=lambda r: json.loads(r.model_dump_json())):
    answer = http.post(url + "/infer", json=dump(request))
    return InferenceResponse.model_validate(answer.json()) if answer.status_code == 200 else [answer.status_code, answer.json()["error"]]


def everything(request):
    "As a client does that writes what is not set as null"
    return json.loads(super(type(request), request).model_dump_json(exclude_unset=False, exclude_none=False))


rows, words = np.array([[1, 2], [3, 4.5]], np.float32), ["good", "schön", ""]
found = {}
for name, make in {"numpy": lambda: InferenceRequest(inputs=[NumpyCodec.encode_input("x", rows)]), "numpy request": lambda: NumpyRequestCodec.encode_request(rows)}.items():
    request = make()
    request.inputs[0].name = "x"
    found[name] = NumpyCodec.decode_output(ask(NUMBERS, request).outputs[0]).tolist()
found["nulls"] = NumpyCodec.decode_output(ask(NUMBERS, request, everything).outputs[0]).tolist()
for use_bytes in (True, False):
    request = InferenceRequest(inputs=[StringCodec.encode_input("text", words, use_bytes=use_bytes)], outputs=[RequestOutput(name="loud", parameters={"content_type": "str"})])
    found[f"texts {use_bytes}"] = StringCodec.decode_output(ask(TEXTS, request).outputs[0])
request = StringRequestCodec.encode_request(words)
request.inputs[0].name, request.outputs = "text", [RequestOutput(name="loud")]
found["text request"] = StringRequestCodec.decode_response(ask(TEXTS, request))
request = InferenceRequest(inputs=[Base64Codec.encode_input("text", [w.encode() for w in words], use_bytes=False)])
found["base64"] = StringCodec.decode_output(ask(TEXTS, request).outputs[0])
request = PandasCodec.encode_request(pd.DataFrame({"text": np.array(words, object)}, dtype=object), use_bytes=False)
found["pandas"] = PandasCodec.decode_response(ask(TEXTS, request)).to_dict("list")
found["datetime"] = ask(TEXTS, InferenceRequest(inputs=[DatetimeCodec.encode_input("text", ["2026-01-01"], use_bytes=False)]))
found["metadata"] = MetadataModelResponse.model_validate(http.get(TEXTS).json()).inputs[0].datatype
print(json.dumps(found))
