"""Each door of the table in grpo/policy/patches.py: what it lets in, and what stays the library's."""

import gc
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import write_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit
from test_lora import IDS, load, relative_error, run
from transformers import AutoModelForCausalLM

import grpo.policy.patches
from grpo.logprobs import last_hidden
from grpo.policy.layers import MODEL_TYPES
from grpo.policy.models import Policy, load_policy, reference_policy, set_compute_dtype
from grpo.policy.patches import ATTENTIONS, DECODER_LAYERS, MLPS, NORMS, fuse_adapters, fuse_layers, precomputed_results
from grpo.policy.recompute import ActivationCheckpoint, OffloadedInputs

OF_PEFT = "ignore:`is_gradient_checkpointing`:FutureWarning"
"""what PEFT, called by a test, asks transformers for by its old name"""


def test_classes_and_model_types_are_in_step():
    for kinds in (NORMS, MLPS, ATTENTIONS, DECODER_LAYERS):
        assert [inspect.getfile(kind).split("modeling_")[1].removesuffix(".py") for kind in kinds] == [*MODEL_TYPES]


def test_swapped_classes_keep_names_and_files(model_folder):
    policy = load(model_folder(), fused=False)
    printed, before = str(policy), {n: t.clone() for n, t in policy.state_dict().items()}
    fuse_layers(policy)
    after = policy.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert str(policy).replace("FusedLinear4bit", "Linear4bit") == printed


def test_a_model_with_swapped_classes_is_gone_when_it_is_dropped(model_folder):
    """Without the collector's help: on a GPU its weights would wait for it."""
    policy = load(model_folder(), kept_layers=1, offload=True)
    run(policy)
    alive = [weakref.ref(m) for m in policy.modules() if type(m).__mro__[1] in (*NORMS, *MLPS, Linear4bit)]
    assert len(alive) == 21
    gc.collect()
    gc.disable()
    try:
        del policy
        assert sum(ref() is not None for ref in alive) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("part", ["rms_norm", "rope", "swiglu"])
def test_each_forward_is_in_use(model_folder, monkeypatch, part):
    """The patched forward is what runs: with a wrong formula the logits differ."""
    policy = load(model_folder(), fused=False)
    expected = run(policy)[0]
    fuse_layers(policy)
    wrong = {"rms_norm": lambda x, *_: x, "rope": lambda q, k, *_: (q, k), "swiglu": lambda gate, up: gate * up}[part]
    home = grpo.policy.layers if part == "swiglu" else grpo.policy.patches
    monkeypatch.setattr(home, part, wrong)
    assert relative_error(run(policy)[0], expected) > 0.1


def test_the_rotary_embedding_of_other_models_stays(model_folder):
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    theirs = module.apply_rotary_pos_emb
    load(model_folder())
    assert module.apply_rotary_pos_emb is theirs
    assert inspect.unwrap(module.LlamaAttention.forward).__globals__["apply_rotary_pos_emb"] is theirs

    class Other(torch.nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"Other.forward calls no apply_rotary_pos_emb .* pass fused=False"):
        grpo.policy.patches._with_fused_rope(Other)


@pytest.mark.filterwarnings(r"ignore:`lora_bias", OF_PEFT)
def test_an_adapted_layer_leaves_to_peft_what_is_unusual(model_folder, monkeypatch):
    policy = load(model_folder(), fused=False)
    layer = next(m for m in policy.modules() if isinstance(m, Linear4bit))
    calls = []
    theirs = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, *a: (self is layer and calls.append(1)) or theirs(self, *a))
    fuse_adapters(policy)
    assert fuse_adapters(policy) == 0
    expected = policy(input_ids=IDS).logits
    assert not calls
    layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    policy(input_ids=IDS)
    assert calls == [1]
    layer.lora_dropout["default"] = torch.nn.Identity()
    policy.add_adapter("second", policy.peft_config["default"])
    policy.base_model.set_adapter(["default", "second"])  # the second's B is zero
    torch.testing.assert_close(policy(input_ids=IDS).logits, expected)
    assert calls == [1, 1]

    config = LoraConfig(r=2, target_modules=["up_proj"], lora_bias=True, task_type="CAUSAL_LM")
    biased = get_peft_model(load(model_folder(), fused=False).unload(), config)
    expected = biased(input_ids=IDS).logits
    assert fuse_adapters(biased) == 2
    torch.testing.assert_close(biased(input_ids=IDS).logits, expected, rtol=0, atol=0)


def test_another_peft_is_refused(model_folder, monkeypatch):
    policy = load(model_folder(), fused=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    with pytest.raises(ValueError, match=r"written for peft 0\.21\.\* and found 0\.99\.0; .* pass fused=False"):
        fuse_adapters(policy)


def test_precomputed_results_serve_one_input_once(model_folder):
    """And an error on the way leaves nothing behind."""
    attention = load(model_folder()).get_base_model().model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj]
    x = torch.randn(2, 3, 64)
    expected = [layer(x) for layer in layers]
    wrong = [torch.zeros_like(y) for y in expected]
    with precomputed_results(layers, x, wrong):
        assert layers[0](x) is wrong[0]
        assert torch.equal(layers[0](x), expected[0])
        assert torch.equal(layers[1](x.clone()), expected[1])
    with pytest.raises(ZeroDivisionError), precomputed_results(layers, x, wrong):
        raise ZeroDivisionError
    assert [torch.equal(layer(x), y) for layer, y in zip(layers, expected)] == [True, True]


def test_which_layers_get_our_checkpoint(model_folder):
    """Those of known classes that are checkpointed, and none in a policy that is to be transformers' own."""

    def ours(architecture, **settings):
        policy = load(model_folder(architecture), **settings)
        functions = [m._gradient_checkpointing_func for m in policy.modules() if type(m) in DECODER_LAYERS]
        ours = [f for f in functions if isinstance(f, ActivationCheckpoint)]
        return len(ours), sum(hasattr(f.skip_output, "__self__") for f in ours)  # and those that skip the last product

    assert [ours("llama", kept_layers=n) for n in (0, 1, 9)] == [(2, 2), (1, 1), (0, 0)]
    assert [ours("phi3", kept_layers=0), ours("qwen3", kept_layers=0)] == [(2, 2), (0, 0)]
    assert ours("llama", kept_layers=0, load_in_4bit=False) == (2, 0)
    assert ours("llama", kept_layers=0, fused=False) == (0, 0)


def test_a_skipped_output_may_be_anything(model_folder, monkeypatch):
    policy = load(model_folder(), kept_layers=0)
    expected = run(policy)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: x.new_full(shape, float("nan")))
    assert all(torch.equal(a, e) for a, e in zip(run(policy), expected))
    down = policy.get_base_model().model.layers[0].mlp.down_proj
    with down.skip_output():
        assert down(torch.ones(1, 128)).isnan().all()
    assert not down(torch.ones(1, 128)).isnan().any()


def test_offloading_is_a_property_of_the_policy_where_gradients_are_recorded(model_folder, monkeypatch):
    """Whoever runs the backbone: the head's owner, or we. And an error leaves nothing switched on."""
    moved = []
    put = OffloadedInputs.put
    monkeypatch.setattr(OffloadedInputs, "put", lambda self, x: moved.append(1) or put(self, x))
    policy = load(model_folder(), kept_layers=0, offload=True)
    backbone = policy.get_base_model().model
    for forward in (lambda: last_hidden(policy, IDS, use_cache=False), lambda: policy(input_ids=IDS)):
        moved.clear()
        forward()
        assert moved == [1, 1]  # one for each layer
        with torch.no_grad():
            forward()
        with torch.inference_mode():
            forward()
        with reference_policy(policy):
            forward()
        assert moved == [1, 1]
    with monkeypatch.context() as patch:
        patch.setattr(backbone.layers[1].mlp, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            policy(input_ids=IDS)
    assert all(layer._gradient_checkpointing_func.offloaded is None for layer in backbone.layers)


def test_the_products_dtype_is_ours(model_folder, monkeypatch):
    """A checkpoint may ask for another; and bitsandbytes repacks weights on a CPU that multiplies bf16 itself."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    layers = [m for m in load(model_folder()).modules() if isinstance(m, bnb.nn.Linear4bit)]
    for dtype in (torch.float32, torch.bfloat16):
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
        assert {layer.compute_dtype for layer in layers} == {layer.weight.quant_state.dtype for layer in layers}
        assert {layer.compute_dtype for layer in layers} == {dtype}
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True
            set_compute_dtype(layer, torch.bfloat16)


@pytest.mark.filterwarnings(OF_PEFT)
def test_an_adapter_trained_with_dropout_is_continued_without(model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder())
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    policy = load_policy(Policy(model_folder(), adapter=tmp_path / "adapter"))
    ids = torch.arange(8, 24)[None]
    with torch.no_grad():
        assert torch.equal(policy(ids).logits, policy(ids).logits)
        with reference_policy(policy):
            assert torch.equal(policy(ids).logits, policy(ids).logits)


def test_bitsandbytes_says_all_but_one_line():
    """In a fresh process, after a recipe's imports from this package, which are light. (On most CPUs an import of
    bitsandbytes says nothing, so its logger is spoken to here.)"""
    code = """
import logging, sys
import grpo.policy.models, grpo.policy.chat, grpo.policy.sources
print(sorted({"torch", "transformers", "peft", "bitsandbytes", "safetensors"} & sys.modules.keys()))
log = logging.getLogger("bitsandbytes.backends.cpu.ops")
log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure ...", "No module")
log.warning("Failed to do %s", "something else")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "Failed to do something else\n")
    source = (Path(bnb.__file__).parent / "backends" / "cpu" / "ops.py").read_text()  # what a CPU with AVX512-BF16 says
    assert "logger = logging.getLogger(__name__)" in source
    assert '"Failed to load CPU gemm_4bit_forward from kernels-community: %s.' in source


def test_loading_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load_policy(Policy(str(write_model(tmp_path))), kept_layers=0)
