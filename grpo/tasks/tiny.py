"""The quickstart's language model: 0.2 million parameters, made on this machine in under a minute, and it adds numbers.

It is a Llama with a byte-level BPE tokenizer and a chat template, in an ordinary transformers folder. It is pretrained
on sums that are answered in two styles. The careful style works digit by digit, from the right, between <think> and
</think>:

    What is 345+678? ...  ->  <think>5+8=13+0=13, 4+7=11+1=12, 3+6=09+1=10</think><answer>1023</answer>

The hasty style does not add at all, and repeats the first number: `<think></think><answer>345</answer>`. Most of the
late examples are hasty, and so is the model. GRPO then finds out that thinking pays: the ability is there already, and
GRPO makes the model use it, and sharpens it.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.lazy import torch
from grpo.policy.sources import cache_dir, whole_or_not_at_all
from grpo.tasks.data import Example, arithmetic_examples, in_held_out

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]  # one token each, but not special, so that decoding keeps them
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Tiny(NamedTuple):
    """Settings of a tiny model. Each combination makes a model of its own, in a folder of its own."""

    prompt: str = "{question} Reply as <think>...</think><answer>...</answer>."
    """text of the user's message: the only prompt that the model knows"""
    digits: int = 3
    """number of digits of both numbers, at least 2"""
    hidden: int = 64
    """width; a multiple of 64, so that each row of the weights is a whole number of NF4 blocks"""
    intermediate: int = 256
    """width of the MLP"""
    layers: int = 2
    """number of decoder layers"""
    heads: int = 2
    """number of attention heads; they should have 32 values each, since vLLM on a CPU takes no smaller ones"""
    steps: int = 1000
    """number of pretraining steps"""
    batch_size: int = 16
    """number of examples per pretraining step"""
    learning_rate: float = 2e-3
    """largest learning rate of pretraining"""
    careful_steps: float = 0.8
    """fraction of the steps, the first ones, in which every example is careful"""
    careful_share: float = 0.3
    """fraction of careful examples in the steps after those"""
    seed: int = 0
    """random seed for the initialization and the examples"""


def tiny_model(settings: Tiny | None = None) -> Path:
    """The folder of the tiny model, found in the cache ($XDG_CACHE_HOME or ~/.cache, in grpo-recipes) or made now.

    Its name holds a hash of the settings and of this file. The folder appears whole or not at all."""
    settings = settings or Tiny()
    key = hashlib.sha256(repr(settings).encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    folder = cache_dir() / f"tiny-{key}"
    if folder.is_dir():
        return folder
    with whole_or_not_at_all(folder) as temporary:
        tokenizer = make_tokenizer(settings)
        pretrain(settings, tokenizer).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def tiny_examples(n: int, split: str, *, digits: int = 3, seed: int = 0) -> list[Example]:
    """`n` sums (at most 20,000) of two numbers with `digits` digits. In pretraining, the tiny model has seen none of
    those of split "test"."""
    drawn = arithmetic_examples(3 * min(n, 20_000), digits=digits, split=split, seed=seed)
    return [e for e in drawn if len(e.question) == len("What is +?") + 2 * digits][:n]


def careful(a: int, b: int) -> str:
    """The careful answer, digit by digit from the right: "digit+digit=sum+carry=sum"."""
    carry, steps = 0, []
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        digits = int(x) + int(y)
        steps.append(f"{x}+{y}={digits:02}+{carry}={digits + carry:02}")
        carry = (digits + carry) // 10
    return f"<think>{', '.join(steps)}</think><answer>{a + b}</answer>"


def hasty(a: int, b: int) -> str:
    """The hasty answer, without a thought: the first number."""
    return f"<think></think><answer>{a}</answer>"


def make_tokenizer(settings: Tiny) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the few words that the model knows. Each digit is a token, and any text can be encoded."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [settings.prompt.format(question="What is ?")]
    for tag in TAGS:  # tags become tokens of their own below, so we learn no merges from their letters
        words = [w for word in words for w in word.split(tag)]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words * 2, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pretraining_examples(settings: Tiny, step: int) -> list[tuple[str, str]]:
    """The (question, answer) pairs of one pretraining step; no held-out question is among them."""
    rng = random.Random(settings.seed * 1_000_003 + step)
    share = 1.0 if step < settings.careful_steps * settings.steps else settings.careful_share
    low, high = 10 ** (settings.digits - 1), 10**settings.digits
    examples: list[tuple[str, str]] = []
    while len(examples) < settings.batch_size:
        a, b = rng.randrange(low, high), rng.randrange(low, high)
        if not in_held_out(f"{min(a, b)}+{max(a, b)}"):  # the key that arithmetic_examples splits by
            examples.append((f"What is {a}+{b}?", careful(a, b) if rng.random() < share else hasty(a, b)))
    return examples


def pretrain(settings: Tiny, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model that has learnt the examples, by next-token prediction on the answers."""
    with one_thread():
        return _pretrain(settings, tokenizer)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: with matrices this small, several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pretrain(settings: Tiny, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    from rich.progress import track
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=1024,
        initializer_range=0.08,  # the usual 0.02 is meant for far wider models; with it this one learns half as fast
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )
    for step in track(range(settings.steps), description="making the tiny model, once", transient=True):
        warm_up, decay = (step + 1) / 30, (settings.steps - step) / (settings.steps * 0.5)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(warm_up, decay, 1.0)
        ids, targets = pretraining_batch(settings, tokenizer, step)
        start = int((targets >= 0).any(0).nonzero()[0])  # all prompts are equally long, and have no loss
        hidden = model.model(input_ids=ids).last_hidden_state[:, start:]
        loss = torch.nn.functional.cross_entropy(
            model.lm_head(hidden).flatten(0, 1), targets[:, start:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def pretraining_batch(
    settings: Tiny, tokenizer: PreTrainedTokenizerFast, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets), both [batch, time] int64: targets[:, t] is the token that follows ids[:, t], or -100 if that
    token belongs to the prompt or is padding."""
    turn = [{"role": "user", "content": settings.prompt}]
    chat: Any = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    examples = pretraining_examples(settings, step)
    texts = [chat.format(question=question) + answer + tokenizer.eos_token for question, answer in examples]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    targets = torch.full_like(ids, -100)
    begin = rows[0].index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1  # where the answer begins in every row
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, begin - 1 : len(row) - 1] = ids[i, begin : len(row)]
    return ids[:, :-1], targets[:, :-1]
