"""What transformers' PyTorch models do with a `Case`: their own losses, `torch.optim.AdamW`, and
their own `generate`."""

from collections.abc import Callable

import numpy as np
import torch
import transformers

from experiments.benchmark.harness import (
    Case,
    Figures,
    examples,
    prompts,
    timed_decoding,
    timed_torch_training,
)
from experiments.benchmark.transformers_configs import transformers_config

MODELS = {
    "bart": transformers.BartForConditionalGeneration,
    "bert": transformers.BertForPreTraining,
    "gpt2": transformers.GPT2LMHeadModel,
    "t5": transformers.T5ForConditionalGeneration,
    "xlnet": transformers.XLNetLMHeadModel,
}
IGNORED = -100  # the label of what is not to be guessed


def measure(case: Case) -> Figures:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MODELS[case.model](transformers_config(case)).train().to(device)
    batch = {name: torch.from_numpy(x).to(device) for name, x in batch_of(case).items()}
    parameters = list(model.parameters())
    figures = timed_torch_training(lambda: model(**batch).loss, parameters, case.steps)
    if not case.decode_batch:
        return figures
    model.eval()
    tokens = torch.from_numpy(prompts(case)).long().to(device)
    length = case.decode_tokens
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
    return figures | fastest(lambda: model.generate(tokens, **options), case)


def fastest(write: Callable[[], object], case: Case) -> Figures:
    """With one thread or all: small products are often faster on one."""
    rates = []
    for threads in {1, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        rates.append(timed_decoding(write, case)["decode_tokens_per_second"])
    return {"decode_tokens_per_second": max(rates)}


def batch_of(case: Case) -> dict[str, np.ndarray]:
    given = {name: x.astype(np.int64) for name, x in examples(case).items()}
    inputs, targets, places = given["inputs"], given["targets"], given["places"]
    match case.model:
        case "bert":
            labels = np.full_like(inputs, IGNORED)
            np.put_along_axis(labels, places, targets, 1)
            return {
                "input_ids": inputs,
                "token_type_ids": given["types"],
                "labels": labels,
                "next_sentence_label": np.ones(len(inputs), np.int64),
            }
        case "gpt2":  # it shifts its labels itself, and loses one
            return {"input_ids": inputs, "labels": inputs}
        case "xlnet":
            order = given["order"]
            hidden = order[:, None, :] >= np.where(order < 0, 0, order)[:, :, None]
            return {
                "input_ids": inputs,
                "token_type_ids": given["types"],
                "perm_mask": hidden.astype(np.float32),
                "target_mapping": np.eye(case.inputs, dtype=np.float32)[places],
                "labels": targets,
            }
        case _:
            return {"input_ids": inputs, "decoder_input_ids": given["shifted"], "labels": targets}
