"""llm-compressor's `model_free_ptq` on a folder. Runs under the peer's own interpreter; needs llmcompressor.

    python peer_model_free_ptq.py FOLDER OUT METHOD

Prints {"seconds", "peak", "version"}: of the call alone, imports left out, as for us.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def scheme(method: str):  # type: ignore[no-untyped-def]
    """int8, a symmetric scale a row; int4, symmetric in groups of 32: what ours writes."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if method == "int8-rows":
        weights = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True, dynamic=False)
    else:
        weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def main() -> None:
    from llmcompressor import model_free_ptq

    folder, out, method = sys.argv[1:]
    wanted, start = scheme(method), time.perf_counter()
    model_free_ptq(folder, out, scheme=wanted, max_workers=2, device="cpu")
    seconds = time.perf_counter() - start
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak": peak, "version": version("llmcompressor")}))


if __name__ == "__main__":
    main()
