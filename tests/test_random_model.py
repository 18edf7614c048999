"""The benchmarks' random checkpoints: what loads is what a quantized checkpoint of that architecture is. And what the
benchmark of recipes replaces in them."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_recipe

from grpo.errors import UserError
from grpo.logprobs import causal_lm
from grpo.policy.chat import encode_chat, load_tokenizer, stop_ids
from grpo.policy.models import Policy, check_policy, load_policy
from grpo.sampler import Sampling
from grpo_rollout.torch.engine import TorchEngine

recipes = load_recipe(ROOT / "benchmarks" / "recipes.py")
random_model = load_recipe(ROOT / "benchmarks" / "random_model.py")
SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "max_position_embeddings": 512}  # fmt: skip


@pytest.mark.parametrize("name", random_model.SHAPES)
def test_a_checkpoint_of_each_shape_loads_as_nf4(name, tmp_path):
    config = random_model.SHAPES[name]
    random_model.write_random(random_model.resized(config, **SMALL), tmp_path / name, "cpu")
    folder = str(tmp_path / name)
    assert config.hidden_size > 1000  # the shapes themselves are left alone
    policy = Policy(folder, lora_rank=4, load_in_4bit=False)  # it is in 4 bits already
    assert check_policy(policy)[1].quantization_config["load_in_4bit"]
    model = load_policy(policy)
    layer = causal_lm(model).model.layers[1].mlp.down_proj.base_layer.weight
    assert layer.quant_state.nested
    assert layer.quant_state.quant_type == "nf4"
    assert layer.quant_state.blocksize == 64
    tokenizer = load_tokenizer(folder)
    prompt = encode_chat(tokenizer, "3+4 ≤ 8?")
    assert tokenizer.decode(prompt) == "<s>user 3+4 ≤ 8?<end>assistant "
    assert stop_ids(folder, tokenizer) == [2, 3]
    # The checkpoint asks for products in bf16; here they are fp32, in the trainer as in the engine's dense copy.
    engine = TorchEngine(model, eos_ids=[2, 3], dequantize=True)
    [completion] = engine.generate([prompt], 1, Sampling(max_tokens=3), seed=0)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
    assert logits.dtype == torch.float32
    expected = logits.log_softmax(-1)[range(len(completion.token_ids)), completion.token_ids]
    assert torch.allclose(torch.tensor(completion.logps), expected, atol=1e-5)
    assert min(completion.logps) > -8  # nearly uniform over 320 tokens: nothing blew up


@pytest.mark.parametrize("name", recipes.ROWS)
def test_the_benchmark_of_recipes_sets_flags_and_replaces_functions_that_exist(name):
    row = recipes.ROWS[name]
    recipe = load_recipe(ROOT / "recipes" / f"{row.recipe}_grpo.py")
    flags = recipes.flags(recipes.Args(), row, Path("model"), Path("run"), Path("data"))
    args = recipes.recipe_args(recipe, flags)
    assert (args.policy.model, args.run.run_dir) == ("model", Path("run"))
    assert (args.rollout.group_size, args.rollout.max_completion_tokens) == (row.group_size, row.completion_tokens)
    assert args.card.gpu_memory_gib == pytest.approx(row.limit_gb * 1e9 / 2**30)
    with pytest.raises(UserError, match="has no such field"):
        recipes.recipe_args(recipe, {"kv_cache": "fp8"})
    recipes.replace_parts(recipe, 4)  # fails for a function that the recipe has not imported
    assert row.shapes in random_model.SHAPES
