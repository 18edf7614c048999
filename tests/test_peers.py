"""The scripts that measure the peers: their checkpoints have the true shapes in the peers' form."""

import sys

import torch
from conftest import ROOT, load_recipe
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(ROOT / "benchmarks"))  # where random_model.py is
checkpoint = load_recipe(ROOT / "benchmarks" / "peers" / "checkpoint.py")


def test_phi4_in_llamas_form_has_as_many_weights():
    with torch.device("meta"):
        ours, theirs = (
            AutoModelForCausalLM.from_config(config)
            for config in (checkpoint.SHAPES["phi4"], checkpoint.peer_config("phi4"))
        )
    assert ours.num_parameters() == theirs.num_parameters()
    assert hasattr(theirs.model.layers[0].self_attn, "q_proj")
