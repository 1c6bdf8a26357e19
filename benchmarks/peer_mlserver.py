"""MLServer with the benchmark's MLP as a custom runtime. Runs under the peer's own interpreter; needs mlserver, torch.

    python peer_mlserver.py FOLDER

Prints {"url", "memory"} when it is ready and ends with its standard input.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

RUNTIME = """
import torch
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class MLP(MLModel):
    async def load(self):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512), torch.nn.ReLU(),
            torch.nn.Linear(512, 10)).eval()
        return True

    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0])
        with torch.inference_mode():
            y = self.net(torch.from_numpy(x)).numpy()
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def main() -> None:
    folder, port = Path(sys.argv[1]), free_port()
    (folder / "mlp_runtime.py").write_text(RUNTIME)
    (folder / "model-settings.json").write_text(json.dumps({"name": "mlp", "implementation": "mlp_runtime.MLP"}))
    settings = {"host": "127.0.0.1", "http_port": port, "parallel_workers": 0, "debug": False}
    settings |= {"grpc_port": free_port(), "metrics_port": free_port(), "access_log": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    server = subprocess.Popen(
        [sys.executable, "-c", "import sys; from mlserver.cli import main; sys.argv[1:] = ['start', '.']; main()"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until_ready(port, server)
        pss = sum(
            int(line.split()[1])
            for line in Path(f"/proc/{server.pid}/smaps_rollup").read_text().splitlines()
            if line.startswith("Pss:")
        )
        print(json.dumps({"url": f"127.0.0.1:{port}", "memory": {"live": pss / 1e3}}), flush=True)
        sys.stdin.read()
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(port: int, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"MLServer ended with {server.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/mlp/ready").close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("MLServer was not ready within a minute")


if __name__ == "__main__":
    main()
