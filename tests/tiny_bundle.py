"""A bundle of random weights, small enough to make in a test: the main job's every path, with a blob as its result."""

from pathlib import Path

import torch

from triptych.bundles.manifest import Manifest, write_bundle
from triptych.models.lifting import LiftedStructureFlow
from triptych.models.structure_vae import SparseStructureDecoder

FLOW = {
    "resolution": 16, "in_channels": 8, "out_channels": 8, "model_channels": 32, "cond_channels": 32, "num_blocks": 1,
    "num_heads": 2, "patch_size": 2, "share_mod": True, "image_size": 128, "encoder_channels": [16, 24],
    "encoder_blocks": [1, 1],
}  # fmt: skip
DECODER = {
    "out_channels": 1, "latent_channels": 8, "num_res_blocks": 0, "channels": [16, 8, 4], "num_res_blocks_middle": 1,
}  # fmt: skip


def make_tiny_bundle(folder: Path, **facts) -> Manifest:
    """Writes the bundle. Its decoder calls everything solid, so that the result is what the silhouettes leave."""
    torch.manual_seed(0)
    flow, decoder = LiftedStructureFlow(**FLOW), SparseStructureDecoder(**DECODER)
    torch.nn.init.constant_(decoder.out_layer[-1].bias, 10.0)
    modules = {"structure_flow": (flow, FLOW), "structure_decoder": (decoder, DECODER)}
    facts = {"sampling": {"steps": 2, "guidance": 0.0}, **facts}
    return write_bundle(folder, modules, name="tiny-random", licence="Apache-2.0", **facts)
