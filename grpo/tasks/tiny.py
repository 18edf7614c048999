"""A language model of 0.2 million parameters, made here in under a minute, that adds numbers: the quickstart's.

It is a Llama with a byte-level BPE tokenizer and a chat template in an ordinary transformers folder, pretrained on
sums answered in two styles. The careful one works digit by digit, from the right, between <think> and </think>:

    What is 345+678? ...  ->  <think>5+8=13+0=13, 4+7=11+1=12, 3+6=09+1=10</think><answer>1023</answer>

The hasty one does not add at all and repeats the first number, `<think></think><answer>345</answer>`. Most of the late
examples are hasty, so hasty it is. What GRPO then does is to find out that thinking pays: the ability is there before;
GRPO makes the model use it, and sharpens it.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo.policy.models import cache_dir, whole_or_not_at_all
from grpo.tasks.data import Example, arithmetic_examples, in_held_out

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]  # one token each, but not special: decoding keeps them
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Tiny(NamedTuple):
    """What makes one tiny model. Another value makes another model, kept beside the first."""

    prompt: str = "{question} Reply as <think>...</think><answer>...</answer>."
    """the user's message: the only prompt the model knows"""
    digits: int = 3
    """of both numbers, at least 2"""
    hidden: int = 64
    """width; a multiple of 64, so that NF4's blocks fit each row of the weights"""
    intermediate: int = 256
    layers: int = 2
    heads: int = 2
    """of 32 values each: vLLM has no attention on a CPU for smaller ones"""
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 2e-3
    careful_steps: float = 0.8
    """share of the steps, the first ones, in which every example is careful"""
    careful_share: float = 0.3
    """share of careful examples in the steps after those"""
    seed: int = 0


def tiny_model(settings: Tiny | None = None) -> Path:
    """The folder of the tiny model, made now or found in the cache: $XDG_CACHE_HOME (or ~/.cache) / grpo-recipes.

    The folder's name holds a hash of the settings and of this file; it appears whole or not at all."""
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
    """`n` sums, of 20,000 at most, of two numbers of `digits` digits. The tiny model has seen none of split "test" in
    pretraining."""
    drawn = arithmetic_examples(3 * min(n, 20_000), digits=digits, split=split, seed=seed)
    return [e for e in drawn if len(e.question) == len("What is +?") + 2 * digits][:n]


def careful(a: int, b: int) -> str:
    """The answer digit by digit, from the right: "digit+digit=sum+carry=sum"."""
    carry, steps = 0, []
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        digits = int(x) + int(y)
        steps.append(f"{x}+{y}={digits:02}+{carry}={digits + carry:02}")
        carry = (digits + carry) // 10
    return f"<think>{', '.join(steps)}</think><answer>{a + b}</answer>"


def hasty(a: int, b: int) -> str:
    """An answer without a thought: the first number."""
    return f"<think></think><answer>{a}</answer>"


def make_tokenizer(settings: Tiny) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the model's few words, each digit a token; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [settings.prompt.format(question="What is ?")]
    for tag in TAGS:  # tags are tokens of their own, so no piece of one is worth a merge
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
    """The (question, answer) pairs of one pretraining step, none of them held out."""
    rng = random.Random(settings.seed * 1_000_003 + step)
    share = 1.0 if step < settings.careful_steps * settings.steps else settings.careful_share
    low, high = 10 ** (settings.digits - 1), 10**settings.digits
    examples: list[tuple[str, str]] = []
    while len(examples) < settings.batch_size:
        a, b = rng.randrange(low, high), rng.randrange(low, high)
        if not in_held_out(f"{min(a, b)}+{max(a, b)}"):  # the split of arithmetic_examples
            examples.append((f"What is {a}+{b}?", careful(a, b) if rng.random() < share else hasty(a, b)))
    return examples


def pretrain(settings: Tiny, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model that has learnt the examples by next-token prediction on the answers."""
    with one_thread():
        return _pretrain(settings, tokenizer)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For matrices as small as these: more threads mostly wait for each other, above all where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pretrain(settings: Tiny, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=1024,
        initializer_range=0.08,  # the usual 0.02 is meant for far wider models: here it learns half as fast
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
        start = int((targets >= 0).any(0).nonzero()[0])  # all prompts are of one length: no loss before that
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
    """(ids, targets), both [batch, time] int64: targets[:, t] is the token after ids[:, t], -100 where that is the
    prompt's or padding."""
    turn = [{"role": "user", "content": settings.prompt}]
    chat: Any = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    examples = pretraining_examples(settings, step)
    texts = [chat.format(question=question) + answer + tokenizer.eos_token for question, answer in examples]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    targets = torch.full_like(ids, -100)
    begin = rows[0].index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1  # of the answer, the same in every row
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, begin - 1 : len(row) - 1] = ids[i, begin : len(row)]
    return ids[:, :-1], targets[:, :-1]
