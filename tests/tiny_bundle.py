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


FIELD_FLOW = FLOW | {"resolution": 64, "in_channels": 1, "out_channels": 1, "patch_size": 8, "hull_skip": True}


def make_field_bundle(folder: Path, **facts) -> Manifest:
    """A bundle as the embedded one: a flow on the field, which here says that all is solid."""
    torch.manual_seed(0)
    flow = LiftedStructureFlow(**FIELD_FLOW)
    flow.empty.fill_(-1)
    torch.nn.init.constant_(flow.out_layer.bias, 1.5)
    modules = {"structure_flow": (flow, FIELD_FLOW)}
    facts = {"sampling": {"steps": 1, "voxels_per_unit": 2.0}, **facts}
    return write_bundle(folder, modules, name="field-random", licence="Apache-2.0", **facts)


def make_tiny_bundle(folder: Path, **facts) -> Manifest:
    """Writes the bundle. Its decoder calls everything solid, so that the result is what the silhouettes leave."""
    torch.manual_seed(0)
    flow, decoder = LiftedStructureFlow(**FLOW), SparseStructureDecoder(**DECODER)
    torch.nn.init.constant_(decoder.out_layer[-1].bias, 10.0)
    modules = {"structure_flow": (flow, FLOW), "structure_decoder": (decoder, DECODER)}
    facts = {"sampling": {"steps": 2, "guidance": 0.0}, **facts}
    return write_bundle(folder, modules, name="tiny-random", licence="Apache-2.0", **facts)
