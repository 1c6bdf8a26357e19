"""Row quantization of a block of weights, compiled once for this machine by g++; without g++ the same in torch.

Both give the same codes and scales, bit for bit: float32 arithmetic, no contraction, round half to even. Plain C++
through ctypes, because its first use costs 0.5 s and any other nothing; torch.compile gave 3.6 GB/s of bf16 for 4 s in
every new process (32 s the first time), this 5 to 6. ctypes releases the interpreter, so blocks go side by side.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weighbridge.engines import datatypes
from weighbridge.engines.packed import Scheme
from weighbridge.storage import private
from weighbridge.storage.streaming import digest_bytes

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

Kernel = Callable[[Scheme, Bytes, int, int, Bytes, Bytes], tuple[float, float]]
"""(scheme, weights, rows, length, codes, scales) → (Σ w², Σ (w − ŵ)²), ŵ being what is read back in w's dtype.

Raises NonFinite. Buffers are bytes of exactly the sizes that follow."""

SMALLEST, LARGEST = 2.0**-126, 3.4028e38
"""The smallest scale, and the largest weight that 127 steps of one float32 scale cannot overflow at."""
_CACHE_CHUNK = 256 << 10
"""Weights that the torch form looks at together: its intermediates stay in a processor's cache."""


_TYPES = {"BF16": "bf16", "F16": "half", "F32": "float", "F64": "double"}


class NonFinite(ValueError):
    """A row holds NaN or Inf, or a float64 beyond float32."""


def pick(dtype: str) -> tuple[Kernel, str]:
    """The kernel for a safetensors dtype, and why it is the slow one (else empty)."""
    try:
        return compiled(dtype), ""
    except (OSError, subprocess.SubprocessError) as exc:
        return functools.partial(eager, dtype), f"compressed without the compiled kernel, 10 times slower: {exc}"


@functools.cache
def compiled(dtype: str) -> Kernel:
    """The C++ kernel. Raises OSError or SubprocessError where it cannot be compiled or loaded."""
    library = _library(_SOURCE.replace("WEIGHT", _TYPES[dtype]))
    function = library.quantize
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, ctypes.c_int, *[ctypes.c_void_p] * 3]

    def kernel(
        scheme: Scheme, weights: Bytes, rows: int, length: int, codes: Bytes, scales: Bytes
    ) -> tuple[float, float]:
        sums = np.zeros(2)
        kind = 0 if scheme.codes == "F8_E4M3" else scheme.bits
        places = [array.ctypes.data for array in (codes, scales, sums)]
        if function(weights.ctypes.data, rows, length, kind, *places) >= 0:
            raise NonFinite
        return float(sums[0]), float(sums[1])

    return kernel


def eager(
    dtype: str, scheme: Scheme, weights: Bytes, rows: int, length: int, codes: Bytes, scales: Bytes
) -> tuple[float, float]:
    """The kernel in torch."""
    source = torch.from_numpy(weights).view(datatypes.to_torch(datatypes.from_safetensors(dtype))).view(rows, length)
    step = max(1, _CACHE_CHUNK // length)
    wide = length * scheme.bits // 8
    brief = scheme.scale == "BF16"
    signal = noise = 0.0
    for start in range(0, rows, step):
        part = source[start : start + step]
        end = start + len(part)
        scale, quantized, sums = _quantize(part, scheme, brief)
        packed = _packed(quantized, scheme)
        codes[start * wide : end * wide] = packed.numpy().reshape(-1).view(np.uint8)
        stored = scale.bfloat16().view(torch.int16) if brief else scale
        scales.view(np.int16 if brief else np.float32)[start:end] = stored.numpy()
        signal, noise = signal + sums[0], noise + sums[1]
    return signal, noise


def _quantize(
    part: torch.Tensor, scheme: Scheme, brief: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    x = part.float()
    most = x.abs().amax(1)
    if not bool(most.isfinite().all()):
        raise NonFinite
    scale = most.clamp(max=LARGEST) / scheme.top
    if brief:
        scale = (scale.view(torch.int32) & -0x10000).view(torch.float32)
    scale = scale.clamp(min=SMALLEST)
    inverse = (1.0 / scale)[:, None]
    y = x * inverse
    if scheme.codes == "F8_E4M3":
        code = y.clamp(-scheme.top, scheme.top).to(torch.float8_e4m3fn)
    else:
        code = y.round().to(torch.int8)
    error = ((code.float() * scale[:, None]).to(part.dtype).float() - x) * inverse
    squared = scale.double() ** 2
    sums = [float((values.square().sum(1).double() * squared).sum()) for values in (y, error)]
    return scale, code, (sums[0], sums[1])


def _packed(code: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    if scheme.bits == 8:
        return code.view(torch.uint8)
    each = 8 // scheme.bits
    digits = (code + (1 << (scheme.bits - 1))).view(torch.uint8).view(len(code), -1, each)
    whole = digits[..., 0].clone()
    for place in range(1, each):
        whole |= digits[..., place] << (place * scheme.bits)
    return whole


_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")


def _library(source: str) -> ctypes.CDLL:
    """Compile, or take what was compiled before on such a processor."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("there is no g++")
    flags = [*_FLAGS, "-mprefer-vector-width=512"] if platform.machine() == "x86_64" else list(_FLAGS)
    name = f"rows-{digest_bytes(repr((source, flags, _processor())).encode())[:32]}.so"
    with tempfile.TemporaryDirectory(prefix="weighbridge-kernel-") as private:
        folder = _cache() or Path(private)
        if not (folder / name).exists():
            made = Path(private) / name
            command = [compiler, *flags, "-x", "c++", "-", "-o", str(made)]
            subprocess.run(command, input=source, text=True, check=True, capture_output=True, timeout=120)
            if folder != Path(private):
                _move(made, folder / name)
        return ctypes.CDLL(str(folder / name))


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _cache() -> Path | None:
    """A folder of our own that nobody else writes into; None: there is none, and each process compiles."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(root) / "weighbridge" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if private.is_folder_ours(folder) and os.access(folder, os.W_OK) else None


def _move(made: Path, place: Path) -> None:
    """Appear whole: another process may load it at this moment."""
    beside = place.with_suffix(f".{os.getpid()}")
    shutil.copyfile(made, beside)
    os.replace(beside, place)


_SOURCE = r"""
#include <cstdint>
#include <cstring>

struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };

static inline float of(uint32_t b) { float x; std::memcpy(&x, &b, 4); return x; }
static inline uint32_t bits(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }

static inline float load(float w) { return w; }
static inline float load(double w) { return (float)w; }
static inline float load(bf16 w) { return of((uint32_t)w.bits << 16); }
static inline float load(half w) {  // 2^112 moves the exponent, also of subnormals
    uint32_t a = w.bits & 0x7fffu;
    uint32_t b = bits(of(a << 13) * of(0x77800000u)) | (a >= 0x7c00u ? 0x7f800000u : 0);
    return of(b | (w.bits & 0x8000u) << 16);
}

// What is read back: rounded to the dtype of the second argument.
static inline float stored(float x, float) { return x; }
static inline float stored(float x, double) { return x; }
static inline float stored(float x, bf16) {
    uint32_t b = bits(x);
    return of((b + 0x7fff + (b >> 16 & 1)) & 0xffff0000u);
}
static inline float stored(float x, half) {  // below 2^-14 adding 0.5 rounds to multiples of 2^-24
    uint32_t b = bits(x), a = b & 0x7fffffffu;
    uint32_t small = bits((of(a) + 0.5f) - 0.5f), normal = (a + 0xfff + (a >> 13 & 1)) & 0xffffe000u;
    return of((a < 0x38800000u ? small : normal) | (b & 0x80000000u));
}

static const float SMALLEST = 1.17549435e-38f, LARGEST = 3.4028e38f;
static const int64_t RUN = 4096, SCRATCH = 65536;

struct Integer {
    static inline float nearest(float y) { return (y + 12582912.0f) - 12582912.0f; }
    static inline uint8_t code(float q) { return (uint8_t)(int8_t)(int32_t)q; }
};

struct Float8 {  // below 2^-6 adding 2^14 rounds to multiples of 2^-9, the smallest subnormal
    static inline float nearest(float y) {
        y = y > 448.0f ? 448.0f : y;
        y = y < -448.0f ? -448.0f : y;
        uint32_t b = bits(y), a = b & 0x7fffffffu;
        uint32_t small = bits((of(a) + 16384.0f) - 16384.0f), normal = (a + 0x7ffff + (a >> 20 & 1)) & 0xfff00000u;
        return of((a < 0x3c800000u ? small : normal) | (b & 0x80000000u));
    }
    static inline uint8_t code(float q) {
        uint32_t b = bits(q), a = b & 0x7fffffffu;
        uint32_t small = bits(of(a) + 16384.0f) - 0x46800000u, normal = (a - 0x3c000000u) >> 20;
        return (uint8_t)((a < 0x3c800000u ? small : normal) | (b >> 24 & 0x80u));
    }
};

template <class T, class Q, int FIXED = 0>
static int64_t rows(const T* w, int64_t count, int64_t given, float top, bool brief, uint8_t* out, void* scales,
                    double* sums) {
    const int64_t length = FIXED ? FIXED : given;
    for (int64_t row = 0; row < count; row++, w += length, out += length) {
        int32_t most = 0;  // of magnitudes as integers, which order as they do, NaN above all
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < length; i++) {
            int32_t a = (int32_t)(bits(load(w[i])) & 0x7fffffffu);
            most = a > most ? a : most;
        }
        if (most >= 0x7f800000) return row;
        float amax = of((uint32_t)most);
        float scale = (amax < LARGEST ? amax : LARGEST) / top;
        if (brief) scale = of(bits(scale) & 0xffff0000u);
        if (scale < SMALLEST) scale = SMALLEST;
        if (brief) ((uint16_t*)scales)[row] = (uint16_t)(bits(scale) >> 16);
        else ((float*)scales)[row] = scale;
        float inverse = 1.0f / scale;
        double signal = 0, noise = 0;
        for (int64_t start = 0; start < length; start += RUN) {
            int64_t end = start + RUN < length ? start + RUN : length;
            float s = 0, n = 0;
#pragma omp simd reduction(+ : s, n)
            for (int64_t i = start; i < end; i++) {
                float x = load(w[i]);
                float y = x * inverse;
                float q = Q::nearest(y);
                out[i] = Q::code(q);
                float d = (stored(q * scale, w[i]) - x) * inverse;
                s += y * y;
                n += d * d;
            }
            signal += s;
            noise += n;
        }
        sums[0] += signal * scale * scale;
        sums[1] += noise * scale * scale;
    }
    return -1;
}

template <class T>
static int64_t groups(const T* w, int64_t count, int64_t length, int width, uint8_t* out, uint16_t* scales,
                      double* sums) {
    uint8_t codes[SCRATCH];
    const float top = width == 4 ? 7.0f : 1.0f;
    const int64_t step = SCRATCH / 4 / length > 0 ? SCRATCH / 4 / length : 1;
    for (int64_t row = 0; row < count; row += step, w += step * length, scales += step) {
        int64_t n = count - row < step ? count - row : step;
        int64_t bad = length == 32 ? rows<T, Integer, 32>(w, n, length, top, true, codes, scales, sums)
                                   : rows<T, Integer>(w, n, length, top, true, codes, scales, sums);
        if (bad >= 0) return row + bad;
        int64_t bytes = n * length * width / 8;
        const uint8_t* c = codes;
        if (width == 4)
            for (int64_t i = 0; i < bytes; i++) out[i] = (uint8_t)((c[2 * i] + 8) | (c[2 * i + 1] + 8) << 4);
        else
            for (int64_t i = 0; i < bytes; i++)
                out[i] = (uint8_t)(((c[4 * i] + 2) & 3) | ((c[4 * i + 1] + 2) & 3) << 2 |
                                   ((c[4 * i + 2] + 2) & 3) << 4 | ((c[4 * i + 3] + 2) & 3) << 6);
        out += bytes;
    }
    return -1;
}

extern "C" int64_t quantize(const WEIGHT* w, int64_t count, int64_t length, int kind, uint8_t* out, void* scales,
                            double* sums) {
    if (kind == 8) return rows<WEIGHT, Integer>(w, count, length, 127.0f, false, out, scales, sums);
    if (kind == 0) return rows<WEIGHT, Float8>(w, count, length, 448.0f, false, out, scales, sums);
    return groups<WEIGHT>(w, count, length, kind, out, (uint16_t*)scales, sums);
}
"""
