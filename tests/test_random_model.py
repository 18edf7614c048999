"""The benchmarks' random checkpoints: what loads is what a quantized checkpoint of that architecture is."""

import pytest
import torch
from conftest import ROOT, load_recipe

from grpo.logprobs import causal_lm
from grpo.policy.models import check_policy, encode_chat, load_policy, load_tokenizer, stop_ids
from grpo_rollout.engine import Sampling
from grpo_rollout.torch.engine import TorchEngine

random_model = load_recipe(ROOT / "benchmarks" / "random_model.py")
SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "max_position_embeddings": 512}  # fmt: skip


@pytest.mark.parametrize("name", random_model.SHAPES)
def test_a_checkpoint_of_each_shape_loads_as_nf4(name, tmp_path):
    config = random_model.SHAPES[name]
    random_model.write_random(random_model.resized(config, **SMALL), tmp_path / name, "cpu")
    folder = str(tmp_path / name)
    assert config.hidden_size > 1000  # the shapes themselves are left alone
    assert check_policy(folder, lora_rank=4)[1].quantization_config["load_in_4bit"]
    model = load_policy(folder, lora_rank=4, load_in_4bit=False)  # it is in 4 bits already
    layer = causal_lm(model).model.layers[1].mlp.down_proj.base_layer.weight
    assert layer.quant_state.nested
    assert layer.quant_state.quant_type == "nf4"
    assert layer.quant_state.blocksize == 64
    tokenizer = load_tokenizer(folder)
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "3+4 ≤ 8?"}])
    assert tokenizer.decode(prompt) == "<s>user 3+4 ≤ 8?<end>assistant "
    assert stop_ids(folder, tokenizer) == [2, 3]
    # The checkpoint asks for products in bf16; here they are fp32, in the trainer as in the engine's dense twin.
    engine = TorchEngine(model, eos_ids=[2, 3], dequantize=True)
    [completion] = engine.generate([prompt], 1, Sampling(max_tokens=3), seed=0)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
    assert logits.dtype == torch.float32
    expected = logits.log_softmax(-1)[range(len(completion.token_ids)), completion.token_ids]
    assert torch.allclose(torch.tensor(completion.logps), expected, atol=1e-5)
    assert min(completion.logps) > -8  # nearly uniform over 320 tokens: nothing blew up
