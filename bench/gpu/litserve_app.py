"""LitServe with the package's own TorchScript file; tensors as base64 in JSON."""
import base64
import json
import os

import litserve as ls
import numpy as np
import torch

INPUTS = json.loads(os.environ["LIT_INPUTS"])


class API(ls.LitAPI):
    def setup(self, device):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.place, self.model = device, torch.jit.load(os.environ["LIT_MODEL"], map_location=device).eval()

    def decode_request(self, request):
        return {n: torch.from_numpy(np.frombuffer(base64.b64decode(request[n]), dtype).reshape(shape).copy()) for n, (shape, dtype) in INPUTS.items()}

    def batch(self, inputs):
        return {n: torch.stack([i[n] for i in inputs]).to(self.place) for n in INPUTS}

    def predict(self, x):
        with torch.inference_mode():
            return self.model(*x.values()).cpu()

    def unbatch(self, y):
        return list(y)

    def encode_response(self, y):
        return {"y": y.ravel().tolist()}


if __name__ == "__main__":
    server = ls.LitServer(API(max_batch_size=32, batch_timeout=0.002), accelerator=os.environ["LIT_DEVICE"], devices=1, workers_per_device=1)
    server.run(host="127.0.0.1", port=int(os.environ["LIT_PORT"]), num_api_servers=1, generate_client_file=False, log_level="warning", access_log=False)
