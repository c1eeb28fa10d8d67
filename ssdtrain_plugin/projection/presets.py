"""GPUs, drives and models by name, each with the page that its figures come from."""

from __future__ import annotations

from typing import Any

__all__ = ["DRIVES", "GPUS", "MODELS"]

_GB, _TB = 1e9, 1e12


def _gpu(tflops: float, memory_gb: float, hbm_tb: float, link_gb: float, source: str) -> dict[str, Any]:
    return {
        "peak_flops_per_second": tflops * 1e12,
        "memory_bytes": memory_gb * _GB,
        "hbm_bytes_per_second": hbm_tb * _TB,
        "link_bytes_per_second": link_gb * _GB,
        "source": source,
    }


_A100 = "NVIDIA A100 data sheet (2021): BF16 dense, NVLink 600 GB/s in both directions"
GPUS = {
    "a100-pcie-40gb": _gpu(312, 40, 1.555, 300, _A100),
    "a100-sxm-40gb": _gpu(312, 40, 1.555, 300, _A100),
    "a100-pcie-80gb": _gpu(312, 80, 1.935, 300, _A100),
    "a100-sxm-80gb": _gpu(312, 80, 2.039, 300, _A100),
    "h100-sxm-80gb": _gpu(
        989.4, 80, 3.35, 450, "NVIDIA H100 data sheet: BF16 1,979 with sparsity, NVLink 900 GB/s in both directions"
    ),
    "h200-sxm-141gb": _gpu(
        989.4, 141, 4.8, 450, "NVIDIA H200 data sheet: BF16 1,979 with sparsity, NVLink 900 GB/s in both directions"
    ),
    "b200-sxm-180gb": _gpu(
        2250,
        180,
        8.0,
        900,
        "NVIDIA HGX B200: BF16 4,500 with sparsity, 1.44 TB for 8, NVLink 1.8 TB/s in both directions",
    ),
}
"""Dense 16-bit rate, memory, memory bandwidth, link bandwidth in one direction."""


def _drive(read_mb: float, write_mb: float, capacity_tb: float, rated_tb: float, source: str) -> dict[str, Any]:
    return {
        "read_bytes_per_second": read_mb * 1e6,
        "write_bytes_per_second": write_mb * 1e6,
        "capacity_bytes": capacity_tb * _TB,
        "rated_write_bytes": rated_tb * _TB,
        "source": source,
    }


DRIVES = {
    "samsung-980-pro-1tb": _drive(
        7000, 5000, 1.0, 600, "Samsung 980 PRO data sheet; writes at this rate only until its SLC cache is full"
    ),
    "micron-9550-max-6.4tb": _drive(14000, 10000, 6.4, 35_040, "Micron 9550 product brief: TBW under random writes"),
    "intel-d7-p5600-6.4tb": _drive(7000, 4300, 6.4, 35_040, "Intel D7-P5600 product brief: 3 DWPD for 5 years"),
    "intel-p5800x-1.6tb": _drive(7200, 6200, 1.6, 292_000, "Intel Optane P5800X product brief: 100 DWPD for 5 years"),
}
"""Sequential rates, capacity, rated bytes (TBW)."""


def _model(family: str, layers: int, hidden: int, heads: int, vocab: int, sequence: int, source: str) -> dict[str, Any]:
    return {
        "family": family,
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "vocab": vocab,
        "sequence": sequence,
        "source": source,
    }


def _bert(hidden: int, layers: int) -> dict[str, Any]:
    return _model("bert", layers, hidden, hidden // 128, 32_000, 1024, "SSDTrain (arXiv 2408.10013), Table III")


_LLAMA = "Touvron et al., Llama 2 (arXiv 2307.09288)"
MODELS = {
    "gpt2-xl": _model("gpt", 48, 1600, 25, 50_257, 1024, "Radford et al., 2019"),
    "gpt3-175b": _model("gpt", 96, 12_288, 96, 50_257, 2048, "Brown et al. (arXiv 2005.14165), Table 2.1"),
    "gpt-530b": _model("gpt", 105, 20_480, 128, 51_200, 2048, "Smith et al., MT-NLG (arXiv 2201.11990)"),
    "bert-h8192-l4": _bert(8192, 4),
    "bert-h12288-l3": _bert(12_288, 3),
    "bert-h16384-l2": _bert(16_384, 2),
    "bert-large": _model("bert", 24, 1024, 16, 30_522, 512, "Devlin et al. (arXiv 1810.04805)"),
    "t5-11b": {
        **_model("t5", 48, 1024, 128, 32_128, 512, "Raffel et al. (arXiv 1910.10683)"),
        "head_dim": 128,
        "ffn": 65_536,
        "activation": "relu",
    },
    "llama-2-7b": {**_model("llama", 32, 4096, 32, 32_000, 4096, _LLAMA), "ffn": 11_008, "tied_embeddings": False},
    "llama-2-70b": {
        **_model("llama", 80, 8192, 64, 32_000, 4096, _LLAMA),
        "kv_heads": 8,
        "ffn": 28_672,
        "tied_embeddings": False,
    },
}
"""Sizes of published models."""
