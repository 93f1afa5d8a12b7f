"""KServe's own client against a server: V1, V2 in JSON, V2 in bytes. Prints what each method gave as one JSON object."""
import asyncio
import json
import sys

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferOutput, InferRequest, RESTConfig

URL, NAME, ROWS = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])


def request(binary, **more):
    "What KServe's client sends: the model's name stands in the body too"
    asked = InferInput("x", [len(ROWS), 2], "FP32")
    asked.set_data_from_numpy(np.array(ROWS, np.float32), binary_data=binary)
    return InferRequest(NAME, [asked], **more)


async def refused(client, *args):
    try:
        await client.infer(URL, *args)
    except httpx.HTTPStatusError as e:
        return [e.response.status_code, str(e)]


async def main():
    found = {}
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as v1:
        found["v1"] = await v1.infer(URL, {"instances": ROWS}, NAME)
        found["v1 live"], found["v1 ready"] = await v1.is_server_live(URL), await v1.is_model_ready(URL, NAME)
        found["v1 refused"] = await refused(v1, {"instances": [[1]]}, NAME)
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as v2:
        found["live"], found["ready"], found["model ready"] = await v2.is_server_live(URL), await v2.is_server_ready(URL), await v2.is_model_ready(URL, NAME)
        for way, asked in {"json": request(False, request_id="a"), "binary": request(True), "all binary": request(True, parameters={"binary_data_output": True}),
                           "mixed": request(False, parameters={"binary_data_output": True})}.items():
            answer = await v2.infer(URL, asked, NAME)
            found[way] = {"id": bool(answer.id), "model": answer.model_name, "y": answer.get_output_by_name("y").as_numpy().tolist(),
                          "type": type(answer.outputs[0]).__name__ == InferOutput.__name__}
        wrong = request(False)
        wrong.model_name = "another"
        found["v2 refused"] = await refused(v2, wrong, NAME)
    print(json.dumps(found))


asyncio.run(main())
