"""Train GPT-2 with softmax, convert it, train on in several ways; then the table and the figures."""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import json
import logging
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from experiments.draw import draw
from experiments.fine_tune.report import FOLDER, VARIANTS
from experiments.provenance import code_hash, device_name
from experiments.results import write_json
from liegroup_attn.lightning import ByteCorpus, ExactResume, FineTune, GeneratorMonitor
from liegroup_attn.nn import LieFlow, convert_attention

__all__ = ["main"]

SIZES = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
SHOWN = 48  # tokens of the matrices in the figure
NUMBERS = ["time", "exit_rate", "expected_hops", "entropy", "effective_rank", "distance_to_softmax"]


class Bytes(nn.Module):
    """Somebody else's model as it comes: Hugging Face's GPT-2 on bytes, tokens in and logits out."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        self.gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=256, **SIZES, **still))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N) → (B, N, 256)."""
        return self.gpt2(input_ids=tokens, use_cache=False).logits


class Pairs(ByteCorpus):
    """Batches (tokens, targets), as ``FineTune`` takes them."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch["tokens"], batch["targets"]) if isinstance(batch, dict) else batch


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``liegroup-attn fine-tune``."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    console, setting = Console(), _setting(args)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            task = progress.add_task("", total=len(args.seeds) * (1 + len(VARIANTS)))
            for seed in args.seeds:
                _run_seed(seed, args, setting, lambda what: progress.update(task, description=what), progress, task)
    except KeyboardInterrupt:
        console.print("\nstopped; finished runs are kept, and the same command again resumes")
        sys.exit(130)
    for written in draw(args.output, [FOLDER]):
        console.print(f"wrote {written}")
    console.print((args.output / FOLDER / "table.md").read_text(), markup=False, soft_wrap=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="liegroup-attn fine-tune",
        description="Train a small GPT-2 on bytes with softmax attention, convert its attention and train on: everything or "
        "the flows alone, with a fixed or an exponential clock, beside softmax. Finished runs are kept: the same command "
        "again resumes.",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--corpus", default="tinyshakespeare", help="as ByteCorpus takes it; default tinyshakespeare")
    parser.add_argument("--path", default=None, help="a local copy of the corpus instead of a download")
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=150, help="after the conversion")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/fine-tune"), help="results, table, figures")
    return parser.parse_args(argv)


def _setting(args: argparse.Namespace) -> dict[str, Any]:
    """What all files of a folder must share."""
    return {
        "corpus": args.corpus,
        "pretrain_steps": args.pretrain_steps,
        "steps": args.steps,
        "batch_size": 16,
        "learning_rate": {"pretrain": 1e-3, "after": 3e-4, "lie": 1e-2},
        "model": {"name": "GPT2LMHeadModel", "vocab_size": 256, **SIZES},
    }


def _run_seed(
    seed: int, args: argparse.Namespace, setting: dict[str, Any], say: Any, progress: Progress, task: Any
) -> None:
    folder, work = args.output / FOLDER / "results", args.output / FOLDER / "work"
    trained: nn.Module | None = None
    for variant, (_, options, trainable) in VARIANTS.items():
        path = folder / f"{variant}-seed{seed}.json"
        if path.exists():
            if json.loads(path.read_text())["setting"] != setting:
                raise ValueError(
                    f"output: expected results with this command's setting, got {path} with another; delete it, or pass "
                    "another --output"
                )
            progress.advance(task)
            continue
        if trained is None:
            say(f"seed {seed}: softmax, {args.pretrain_steps} steps")
            trained = _pretrained(seed, args, setting, work / f"pretrained-seed{seed}-{args.pretrain_steps}.pt")
            progress.advance(task)
        say(f"seed {seed}: {variant}")
        model = copy.deepcopy(trained)
        convert_attention(model, **options)
        found = _train(model, seed + 1000, args, setting, trainable, args.steps)
        found["matrices"] = _matrices(model, args, seed) if variant != "softmax" and seed == args.seeds[0] else None
        write_json(path, _facts(args, setting) | {"variant": variant, "seed": seed} | found)
        progress.advance(task)


def _pretrained(seed: int, args: argparse.Namespace, setting: dict[str, Any], path: Path) -> nn.Module:
    """The softmax model, from where it was kept if it was."""
    L.seed_everything(seed, verbose=False)
    model = Bytes()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    convert_attention(model, learn_time=False, learn_rates=False)  # FineTune takes converted models; time stays 0
    _train(model, seed, args, setting, "all", args.pretrain_steps, setting["learning_rate"]["pretrain"], warmup=50)
    plain = Bytes()
    own = plain.state_dict()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(plain.state_dict(), path)
    return plain


def _train(
    model: nn.Module,
    seed: int,
    args: argparse.Namespace,
    setting: dict[str, Any],
    trainable: Any,
    steps: int,
    learning_rate: float | None = None,
    warmup: int = 20,
) -> dict[str, Any]:
    """Train, validate every quarter, test once at the end; what the monitor saw."""
    L.seed_everything(seed, verbose=False)
    rates = setting["learning_rate"]
    tuner = FineTune(
        model,
        trainable,
        learning_rate=learning_rate or rates["after"],
        lie_learning_rate=rates["lie"],
        weight_decay=0.01,
        warmup_steps=warmup,
    )
    sizes = {"context": SIZES["n_positions"], "batch_size": setting["batch_size"], "eval_windows": 128}
    data = Pairs(args.corpus, path=args.path, seed=seed, train_windows=steps * setting["batch_size"], **sizes)
    with tempfile.TemporaryDirectory() as logs:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            val_check_interval=max(1, steps // 4),
            logger=CSVLogger(logs),
            callbacks=[
                ExactResume(),
                GeneratorMonitor(figures=False, every_n_steps=max(1, steps // 10), metrics=NUMBERS),
            ],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            log_every_n_steps=max(1, steps // 10),
            gradient_clip_val=1.0,
        )
        (before,) = trainer.validate(tuner, data, verbose=False)
        start = time.process_time()
        trainer.fit(tuner, data)
        seconds = time.process_time() - start
        (test,) = trainer.test(tuner, data, verbose=False)
        with open(Path(trainer.log_dir or logs) / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "validation": [[0, before["validation/loss"]], *_series(rows, "validation/loss", past=0)],
        "test_loss": test["test/loss"],
        "cpu_seconds": seconds,
        "monitor": {
            name: _series(rows, name) for name in sorted({n for row in rows for n in row if n.startswith("lie/")})
        },
        "times": {
            name.rpartition(".")[0]: [round(float(t), 4) for t in m.flow_time().detach().flatten()]
            for name, m in model.named_modules()
            if isinstance(m, LieFlow)
        },
        "data": data.facts(),
    }


def _series(rows: list[dict[str, str]], name: str, past: int = -1) -> list[list[float]]:
    """Pairs (step, value) of a column."""
    return [[int(row["step"]) + 1, float(row[name])] for row in rows if row.get(name) and int(row["step"]) > past]


def _matrices(model: nn.Module, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """S, Q and P(t) of the head with the longest time on the first validation window."""
    data = Pairs(args.corpus, path=args.path, context=SHOWN, batch_size=1, eval_windows=1, train_windows=1)
    data.setup()
    tokens = next(iter(data.val_dataloader()))["tokens"]
    flows = {name: m for name, m in model.named_modules() if isinstance(m, LieFlow)}
    name, flow = max(flows.items(), key=lambda pair: float(pair[1].flow_time().detach().max()))
    head = int(flow.flow_time().argmax())
    seen: list[Any] = []
    hook = flow.register_forward_pre_hook(lambda _, a, k: seen.append((a, k)), with_kwargs=True)
    model.eval().requires_grad_(True)(tokens)  # without gradients a time of 0 would be passed by
    hook.remove()
    (query, key, value, *mask), options = seen[0]
    kept = {k: v for k, v in options.items() if k in ("is_causal", "scale")}
    with torch.no_grad():
        generator = flow.generator(query, key, value, *mask, **kept)
        mixing = flow(query, key, value, *mask, **kept, need_weights=True)[1]
        found = {"S": generator.jump_chain(), "Q": generator.dense(), "P(t)": mixing}
    return {
        "layer": name.removesuffix(".lie"),
        "head": head,
        "time": round(float(flow.flow_time().detach()[head]), 3),
        "text": bytes(tokens[0].tolist()).decode("latin-1"),
        **{k: [[round(x, 4) for x in row] for row in m[0, head].tolist()] for k, m in found.items()},
    }


def _facts(args: argparse.Namespace, setting: dict[str, Any]) -> dict[str, Any]:
    return {
        "setting": setting,
        "hardware": {"name": device_name(torch.device("cpu")), "threads": args.threads},
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "code": code_hash(),
    }


if __name__ == "__main__":
    main()
