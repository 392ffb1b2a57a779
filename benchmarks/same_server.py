"""Our figures beside those of `vllm bench serve`, in turn on one running server, and those of the engine without a server.

    python benchmarks/same_server.py --python .venv/bin/python --concurrency 1,16,64,256

It starts a vLLM server (`--model`, `--tp`, `--engine-args`), plays both clients at each concurrency, `--repeat` times in turn,
then the same on `vllm.LLM` (`--offline`), and prints a Markdown table of medians with what limits the server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from load_client import VLLM_BENCH

from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.engines.opening import open_engine
from pytest_llmperf.measure.host.model import bundled_model
from pytest_llmperf.measure.launch import RoundSettings, measure_launch
from pytest_llmperf.measure.measurement import Measurement
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes
from pytest_llmperf.plan.case import Case
from pytest_llmperf.plan.engine import EngineSpec, parse_engine_args

if TYPE_CHECKING:
    from pytest_llmperf.measure.engines.engine import Engine
    from pytest_llmperf.plan.workload import Workload

SHOWN = ("output_tokens_per_s", "ttft_p50_s", "tpot_p50_s", "client_cpu_cores")


def ours(engine: Engine, client: LoadClient, workload: Workload, nonce: str) -> Measurement:
    """Return a launch of one round, after a warm-up."""
    launch = measure_launch(engine, client, workload, RoundSettings(nonce=nonce, rounds=1))
    if launch.invalid:
        raise RuntimeError(launch.invalid)
    return Measurement(Case(nonce, engine.spec, workload), (launch,))


def vllm_bench(engine: Engine, workload: Workload, seed: int) -> dict[str, float]:
    """Return what `vllm bench serve` reports of the same load."""
    tokenizer = bundled_model(engine.spec.model) or engine.spec.model
    with tempfile.TemporaryDirectory() as folder:
        command = [
            engine.spec.python, "-c", VLLM_BENCH, "--backend", "openai",
            "--base-url", engine.url, "--model", engine.endpoint.model, "--tokenizer", str(tokenizer), "--dataset-name", "random",
            "--random-input-len", str(workload.prompt_tokens), "--random-output-len", str(workload.output_tokens),
            "--num-prompts", str(workload.requests), "--max-concurrency", str(workload.concurrency), "--ignore-eos",
            "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50", "--seed", str(seed), "--disable-tqdm",
            "--num-warmups", str(workload.concurrency), "--save-result", "--result-filename", "result.json",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads((Path(folder) / "result.json").read_text())
    return {
        "output_tokens_per_s": found["output_throughput"],
        "ttft_p50_s": found["median_ttft_ms"] / 1e3,
        "tpot_p50_s": found["median_tpot_ms"] / 1e3,
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter with vLLM")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--engine-args", default="--max-num-seqs 256")
    parser.add_argument("--concurrency", default="1,16,64,256")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--waves", type=int, default=4, help="requests for each one in flight, at least 16")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--offline", action="store_true", help="measure the engine without a server too")
    args = parser.parse_args()
    spec = EngineSpec(
        model=args.model, tp=args.tp, python=args.python, args=parse_engine_args(args.engine_args, origin="--engine-args")
    )
    workloads = [
        workload_from(Axes(), {
            "prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens,
            "concurrency": number, "requests": max(16, args.waves * number),
        })
        for number in map(int, args.concurrency.split(","))
    ]  # fmt: skip
    rows: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    online: dict[int, Measurement] = {}
    limits: dict[int, str] = {}
    with LoadClient() as client, open_engine(spec) as engine:
        for workload in workloads:
            for number in range(args.repeat):
                found = ours(engine, client, workload, f"{workload.concurrency}/{number}")
                online[workload.concurrency] = found
                rows[workload.concurrency, "pytest-llmperf"].append({name: found[name] for name in SHOWN})
                rows[workload.concurrency, "vllm bench serve"].append(vllm_bench(engine, workload, number))
    if args.offline:
        offline = EngineSpec(model=spec.model, tp=spec.tp, python=spec.python, args=spec.args, kind="offline")
        with LoadClient() as client, open_engine(offline) as engine:
            for workload in workloads:
                for number in range(args.repeat):
                    found = ours(engine, client, workload, f"{workload.concurrency}/{number}")
                    rows[workload.concurrency, "vllm.LLM, no server"].append({name: found[name] for name in SHOWN[:3]})
                limits[workload.concurrency] = online[workload.concurrency].limited_by(found)
    print("| concurrency | client | output tok/s | TTFT p50, ms | TPOT p50, ms | client, cores |\n|---|---|---|---|---|---|")
    for (number, name), values in sorted(rows.items()):
        told = {key: statistics.median(one[key] for one in values) for key in values[0]}
        cpu = f"{told['client_cpu_cores']:.3f}" if "client_cpu_cores" in told else ""
        times = f"{1e3 * told['ttft_p50_s']:.1f} | {1e3 * told['tpot_p50_s']:.2f}"
        print(f"| {number} | {name} | {told['output_tokens_per_s']:,.0f} | {times} | {cpu} |")
    for number, limit in limits.items():
        print(f"limited at concurrency {number} by the {limit}")


if __name__ == "__main__":
    main()
