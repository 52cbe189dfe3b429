"""One configuration for each Triton kernel, in place of the best of many: what the figures on an H100 were taken with.

    eval "$(python benchmarks/one_config.py FOLDER)"

writes files for flash-linear-attention's gated delta rule to FOLDER, and prints the variables that have it and
mamba-ssm take one configuration. To try all of them takes minutes, and again for other sizes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

CONFIGS: dict[str, tuple[dict[str, int], int, int]] = {
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": ({"BV": 32}, 4, 2),
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": ({"BV": 32}, 4, 2),
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel": ({"BK": 64}, 2, 3),
    "chunk_fwd_kernel_o": ({"BK": 64, "BV": 64}, 4, 3),
    "chunk_bwd_kernel_dqkwg": ({}, 4, 2),
    "chunk_bwd_kernel_dv_local": ({}, 4, 2),
    "recompute_w_u_fwd_kernel": ({}, 4, 2),
    "prepare_wy_repr_bwd_kernel": ({}, 4, 2),
    "l2norm_fwd_kernel": ({"BT": 16}, 4, 3),
    "l2norm_bwd_kernel": ({"BT": 16}, 4, 3),
    "chunk_local_cumsum_scalar_kernel": ({}, 2, 3),
}
"""By kernel: sizes of its blocks, warps, and stages of its pipeline."""

ENVIRONMENT = {
    "FLA_CACHE_MODE": "default",
    "MAMBA_DETERMINISTIC": "1",
    "TRITON_AUTOTUNE_BLOCK_SIZE_M": "64",
    "TRITON_AUTOTUNE_BLOCK_SIZE_N": "64",
    "TRITON_F32_DEFAULT": "tf32x3",
}


def write(folder: Path) -> None:
    """Write a file for each kernel, as flash-linear-attention reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for kernel, (sizes, warps, stages) in CONFIGS.items():
        config = {"kwargs": sizes, "num_warps": warps, "num_stages": stages, "num_ctas": 1, "maxnreg": None}
        content = {"kernel_name": kernel, "default_config": config}
        (folder / f"{kernel}.json").write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Write the files and print the variables."""
    command = argparse.ArgumentParser(description="One configuration for each Triton kernel.")
    command.add_argument("folder", type=Path)
    folder = command.parse_args().folder.resolve()
    write(folder)
    print("export", *(f"{name}='{value}'" for name, value in {**ENVIRONMENT, "FLA_CONFIG_DIR": str(folder)}.items()))


if __name__ == "__main__":
    main()
