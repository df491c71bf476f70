"""OpenVLA's REST protocol: POST /act with json-numpy `image`, `instruction` and `unnorm_key` -> the robot's action."""

import json
import pathlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch

from benchmarks.harness.cli import fail
from benchmarks.vla.checkpoint import TrainedPart
from benchmarks.vla.robot import resize, unnormalize

MOST_BYTES = 64 * 2**20  # of a request


def start_server(act, port: int, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """A server, not yet serving, of `act(image (H, W, 3) uint8, instruction, unnorm_key or None) -> (7,)`.

    A request that `act` refuses with ValueError, or that cannot be understood, is answered by 400 and why. It takes one
    request at a time to the policy. Ask `serve_forever()` of what is returned.
    """
    import json_numpy

    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            if self.path.rstrip("/") != "/act":
                return self.answer(404, {"error": "the policy answers POST /act"})
            try:
                length = int(self.headers.get("Content-Length", 0))
                if not 0 < length <= MOST_BYTES:
                    raise ValueError(f"a request has 1 to {MOST_BYTES} bytes, not {length}")
                request = json_numpy.loads(self.rfile.read(length))
                encoded = isinstance(request, dict) and "encoded" in request  # packed by the client beforehand
                if encoded:
                    request = json_numpy.loads(request["encoded"])
                if not isinstance(request, dict) or not isinstance(request.get("instruction"), str):
                    raise ValueError("a request is an object with an `image` and an `instruction`, a text")
                image, instruction = np.asarray(request["image"]), request["instruction"]
                if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
                    raise ValueError(f"`image` must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
                with turn:
                    action = act(image, instruction, request.get("unnorm_key"))
            except (ValueError, KeyError, TypeError, IndexError, RecursionError, SystemExit) as error:
                return self.answer(400, {"error": f"{type(error).__name__}: {error}"})
            action = np.asarray(action, np.float64)
            return self.answer(200, json_numpy.dumps(action) if encoded else action)  # packed as it was asked

        def answer(self, status: int, content) -> None:
            body = (json.dumps(content) if status != 200 else json_numpy.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        fail(f"cannot listen on port {port} ({error.strerror})")


def serve(args, policy, statistics) -> None:
    """Answer with a run's policy as last saved, until stopped: its likeliest action, as OpenVLA's server does."""
    path = pathlib.Path(args.resume) / "checkpoint.pt"
    if not args.resume or not path.is_file():
        fail("--serve needs --resume with the folder of a run that has been saved")
    try:
        trained = torch.load(path, map_location="cpu", weights_only=True)["modules"]["policy"]
        TrainedPart(policy.model).load_state_dict(trained)
    except Exception as error:  # a damaged file can raise almost anything
        fail(f"{path} cannot be read or does not fit this policy ({(str(error) or repr(error)).splitlines()[0]})")
    server = start_server(answer_with(policy, args.unnorm_key, statistics), args.serve, args.serve_host)
    print(f"POST http://{args.serve_host}:{server.server_port}/act as to OpenVLA's server; Ctrl-C ends it", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def answer_with(policy, key: str, statistics):
    """What `start_server` takes, of a policy whose actions are normalised by the statistics of robot `key`."""
    policy.top_k = 1

    def act(image, instruction, unnorm_key):
        if unnorm_key not in (None, key):
            raise ValueError(f"unnorm_key {unnorm_key!r}: this policy's actions are for {key!r}")
        if instruction != policy.instruction:
            policy.set_instruction(instruction)
        image = torch.tensor(resize(image, policy.model.sizes.image), device=policy.device).permute(2, 0, 1)
        return unnormalize(policy.sample(image[None], 1)[0, 0].cpu().numpy(), statistics)

    return act
