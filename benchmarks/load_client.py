"""How much does a load client distort what it measures? Ours and its peers against a server that knows the truth.

    python benchmarks/load_client.py                                     # ours alone
    python benchmarks/load_client.py --vllm .venv/bin/python --guidellm .g/bin/guidellm --aiperf .a/bin/aiperf

`truth_server.c` (compiled with gcc) sends every token at its scheduled instant and records the true arrivals and emissions.
Every client in turn, interleaved `--repeat` times, medians are shown. Server and client have a core each, so that two cores are
needed and nothing else may run on them. Errors are reported minus true value. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pytest_llmperf.measure import metrics
from pytest_llmperf.measure.client.endpoint import Endpoint
from pytest_llmperf.measure.client.processes import LoadClient
from pytest_llmperf.measure.client.prompts import prompts
from pytest_llmperf.measure.formulas import LaunchSample, RoundSample
from pytest_llmperf.measure.host.model import bundled_model
from pytest_llmperf.measure.kv_cache import Capacity
from pytest_llmperf.measure.telemetry import Telemetry
from pytest_llmperf.plan.arguments import workload_from
from pytest_llmperf.plan.axes import Axes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_llmperf.plan.workload import Workload

HERE = Path(__file__).parent
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = CORES[0], CORES[-1]
VLLM_BENCH = (
    "import argparse; from vllm.benchmarks import serve; parser = argparse.ArgumentParser(); serve.add_cli_args(parser);"
    " serve.main(parser.parse_args())"
)
"""`vllm bench serve` without vLLM's command line, which the CPU build lacks the metadata for."""


@dataclass(frozen=True)
class Scenario:
    """A load, and what the server does with it (times in ms)."""

    what: str
    workload: Workload
    ttft: float = 50.0
    itl: float = 10.0
    coalesce: int = 1
    stolen: bool = False
    """Another process takes half of the client's core."""
    processes: int = 1
    peers: bool = True


def load(**arguments: Any) -> Workload:
    """Return a workload of prompts of 100 tokens."""
    return workload_from(Axes(), {"prompt_tokens": 100, **arguments})


SCENARIOS = (
    Scenario("256 streams, 25.6k tok/s", load(concurrency=256, requests=1024, output_tokens=100)),
    Scenario("64 streams, half of the core stolen", load(concurrency=64, requests=256, output_tokens=100), stolen=True),
    Scenario("peak, 64 streams", load(concurrency=64, requests=2048, output_tokens=128), ttft=0, itl=0),
    Scenario("peak, 8 events a write", load(concurrency=64, requests=4096, output_tokens=128), ttft=0, itl=0, coalesce=8),
    Scenario("1 M tokens", load(concurrency=256, requests=8192, output_tokens=128), ttft=0, itl=0, peers=False),
    Scenario(
        "1,024 streams, 51k tok/s, two processes", load(concurrency=1024, requests=4096, output_tokens=100),
        itl=20, processes=2, peers=False,
    ),
    Scenario("Poisson 100/s", load(rate=100, requests=6000, output_tokens=8), ttft=5, itl=1, peers=False),
)  # fmt: skip


@contextlib.contextmanager
def truth_server(binary: Path, scenario: Scenario) -> Iterator[str]:
    """Yield the URL of a server that knows the truth, on its own core."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"port": port, "ttft": scenario.ttft, "itl": scenario.itl, "coalesce": scenario.coalesce, "kts": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    server = subprocess.Popen([str(binary), *words], stderr=subprocess.DEVNULL)
    os.sched_setaffinity(server.pid, {SERVER_CORE})
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                get(f"{url}/health")
                break
            time.sleep(0.02)
        yield url
    finally:
        server.terminate()
        server.wait()


def get(url: str) -> bytes:
    """Return what a URL answers."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        found: bytes = answer.read()
    return found


@contextlib.contextmanager
def thief(*, active: bool) -> Iterator[None]:
    """Take half of the client's core: busy for 5 ms, idle for 5 ms."""
    code = "import time\nwhile True:\n e=time.perf_counter()+.005\n while time.perf_counter()<e: pass\n time.sleep(.005)"
    process = subprocess.Popen([sys.executable, "-c", code]) if active else None
    if process:
        os.sched_setaffinity(process.pid, {CLIENT_CORE})
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def ours(url: str, scenario: Scenario) -> dict[str, float]:
    """Play the scenario with our client and return what it reports, in ms and seconds."""
    workload = scenario.workload
    began = time.monotonic_ns()
    with LoadClient(scenario.processes) as client:
        plan = Endpoint(url, "mock").plan(
            prompts(workload, 0, vocabulary=None, nonce="benchmark"),
            concurrency=workload.concurrency, request_timeout_s=300, stall_timeout_s=60,
        )  # fmt: skip
        children = [psutil.Process(one.pid) for one in psutil.Process().children()]
        children = [one for one in children if "pytest_llmperf.measure.client.load" in " ".join(one.cmdline())]
        for child in children:
            child.cpu_affinity([CLIENT_CORE])
        log = client.play(plan)
        peak_mb = max(peak_memory(child.pid) for child in children)
    errors = Counter(record.error for record in log.records if record.error)
    if errors:
        raise RuntimeError(f"requests failed: {errors.most_common(3)}")
    found = metrics.round_metrics(RoundSample(log.records, Telemetry(), cpu_share=log.cpu_share))
    tails = metrics.launch_metrics(LaunchSample(None, Capacity(), log.records))
    tokens = sum(record.output_tokens or 0 for record in log.records)
    sent = sorted(record.sent_s for record in log.records if record.sent_s is not None)
    windows = Counter(int(at - sent[0]) for at in sent)
    whole = [windows[second] for second in range(int(sent[-1] - sent[0]))]
    return {
        "ttft_mean": 1e3 * (found["ttft_from_send_p50_s" if workload.is_open else "ttft_mean_s"] or 0),
        "ttft_p99": 1e3 * (tails["ttft_p99_s"] or 0),
        "itl_p99": 1e3 * (tails["itl_p99_s"] or 0),
        "e2e_mean": 1e3 * (found["e2e_mean_s"] or 0),
        "tokens_per_s": found["output_tokens_per_s"] or 0,
        "cpu_s_per_mtok": 1e6 * (log.cpu_s + log.parse_s) / tokens,
        "tokens_per_cpu_s": tokens / (log.cpu_s + log.parse_s),
        "memory_mb": peak_mb,
        "kernel_stamps": log.kernel_stamps / max(1, log.kernel_stamps + log.clock_stamps),
        "shared": found["shared_arrivals_ratio"] or 0,
        "start_s": (sent[0] * 1e9 - began) / 1e9,
        "rate": (len(sent) - 1) / (sent[-1] - sent[0]),
        "dispersion": statistics.variance(whole) / statistics.fmean(whole) if len(whole) > 2 else 0.0,
    }


def peak_memory(pid: int) -> float:
    """Return the largest resident size that a process ever had, in MB."""
    lines = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0  # one that has ended has none


def run_peer(command: list[str], folder: Path) -> tuple[float, float]:
    """Run a peer on the client's core; return its CPU seconds with all its children and the largest one's memory in MB."""
    with (folder / "peer.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, preexec_fn=lambda: os.sched_setaffinity(0, {CLIENT_CORE})
        )
        peak = [0.0]
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.2):
                with contextlib.suppress(psutil.Error, OSError):
                    tree = [process.pid, *(one.pid for one in psutil.Process(process.pid).children(recursive=True))]
                    peak[0] = max(peak[0], sum(peak_memory(pid) for pid in tree))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        ended.set()
        watcher.join()
    if status:
        raise RuntimeError(f"{command[:4]} failed: {(folder / 'peer.log').read_text()[-2000:]}")
    return usage.ru_utime + usage.ru_stime, peak[0]


def vllm_bench(python: str) -> Callable[[str, Scenario], dict[str, float]]:
    """Return what plays a scenario with `vllm bench serve`."""

    def play(url: str, scenario: Scenario) -> dict[str, float]:
        workload = scenario.workload
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            cpu_s, memory = run_peer(
                [
                    python, "-c", VLLM_BENCH, "--backend", "openai", "--base-url", url,
                    "--model", "mock", "--tokenizer", str(bundled_model("tiny")), "--dataset-name", "random",
                    "--random-input-len", "100", "--random-output-len", str(workload.mean_output_tokens).partition(".")[0],
                    "--num-prompts", str(workload.requests), "--max-concurrency", str(workload.concurrency), "--ignore-eos",
                    "--percentile-metrics", "ttft,itl,e2el", "--metric-percentiles", "50,99", "--save-result",
                    "--result-filename", "result.json", "--disable-tqdm",
                ],
                folder,
            )  # fmt: skip
            found = json.loads((folder / "result.json").read_text())
        tokens = found["total_output_tokens"]
        return {
            "ttft_mean": found["mean_ttft_ms"], "ttft_p99": found["p99_ttft_ms"], "itl_p99": found["p99_itl_ms"],
            "e2e_mean": found["mean_e2el_ms"], "tokens_per_s": found["output_throughput"], "memory_mb": memory,
            "cpu_s_per_mtok": 1e6 * cpu_s / tokens, "tokens_per_cpu_s": tokens / cpu_s,
        }  # fmt: skip

    return play


def guidellm(program: str) -> Callable[[str, Scenario], dict[str, float]]:
    """Return what plays a scenario with GuideLLM."""

    def play(url: str, scenario: Scenario) -> dict[str, float]:
        workload = scenario.workload
        tokens = int(workload.mean_output_tokens)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            cpu_s, memory = run_peer(
                [
                    program, "run", "--backend", f"kind=openai_http,target={url},model=mock",
                    "--profile", f"kind=concurrent,streams={workload.concurrency}",
                    "--constraint", f"kind=max_requests,count={workload.requests}",
                    "--data", f"kind=synthetic_text,prompt_tokens=100,output_tokens={tokens}",
                    "--tokenizer", f"kind=hf_auto,model={bundled_model('tiny')}",
                    "--output", f"kind=json,path={folder / 'result.json'}", "--disable-console",
                ],
                folder,
            )  # fmt: skip
            found = json.loads((folder / "result.json").read_text())["benchmarks"][0]["metrics"]

        def told(metric: str, statistic: str) -> float:
            values = found[metric]["successful"]
            return float(values["percentiles"][statistic] if statistic.startswith("p") else values[statistic])

        total = workload.requests * tokens
        return {
            "ttft_mean": told("time_to_first_token_ms", "mean"), "ttft_p99": told("time_to_first_token_ms", "p99"),
            "e2e_mean": 1e3 * told("request_latency", "mean"), "tokens_per_s": told("output_tokens_per_second", "mean"),
            "cpu_s_per_mtok": 1e6 * cpu_s / total, "tokens_per_cpu_s": total / cpu_s, "memory_mb": memory,
        }  # fmt: skip

    return play


def aiperf(program: str) -> Callable[[str, Scenario], dict[str, float]]:
    """Return what plays a scenario with AIPerf."""

    def play(url: str, scenario: Scenario) -> dict[str, float]:
        workload = scenario.workload
        tokens = int(workload.mean_output_tokens)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            cpu_s, memory = run_peer(
                [
                    program, "profile", "--model", "mock", "--url", url, "--endpoint-type", "completions", "--streaming",
                    "--tokenizer", str(bundled_model("tiny")), "--concurrency", str(workload.concurrency),
                    "--request-count", str(workload.requests), "--synthetic-input-tokens-mean", "100",
                    "--output-tokens-mean", str(tokens), "--extra-inputs", "ignore_eos:true",
                    "--artifact-dir", str(folder), "--ui", "none",
                ],
                folder,
            )  # fmt: skip
            found = json.loads(next(folder.rglob("profile_export_aiperf.json")).read_text())
        total = workload.requests * tokens
        return {
            "ttft_mean": found["time_to_first_token"]["avg"], "ttft_p99": found["time_to_first_token"]["p99"],
            "e2e_mean": found["request_latency"]["avg"], "tokens_per_s": found["output_token_throughput"]["avg"],
            "cpu_s_per_mtok": 1e6 * cpu_s / total, "tokens_per_cpu_s": total / cpu_s, "memory_mb": memory,
        }  # fmt: skip

    return play


def compare(told: dict[str, float], truth: dict[str, Any], scenario: Scenario) -> dict[str, float]:
    """Return errors in ms and the share of the load that was offered."""
    workload = scenario.workload
    found = dict(told) | {"tokens_per_s": truth["out_tok_s"]}
    if scenario.itl:
        found["ttft_error_mean"] = told["ttft_mean"] - truth["ttft_ms"]["mean"]
        found["ttft_error_p99"] = told["ttft_p99"] - truth["ttft_ms"]["p99"]
        found["e2e_error_mean"] = told["e2e_mean"] - truth["e2e_ms"]["mean"]
        if "itl_p99" in told:
            found["itl_error_p99"] = told["itl_p99"] - truth["itl_ms"]["p99"]
        # What so many streams would bring if each next request were sent at once.
        per_request_s = (scenario.ttft + scenario.itl * (workload.mean_output_tokens - 1)) / 1e3
        waves = workload.requests / workload.concurrency
        found["kept"] = waves * per_request_s / truth["duration_s"]
    return found


SHOWN = {
    "ttft_error_mean": "TTFT error mean, ms", "ttft_error_p99": "p99, ms", "itl_error_p99": "ITL error p99, ms",
    "e2e_error_mean": "E2E error mean, ms", "kept": "load kept", "tokens_per_s": "tok/s served",
    "cpu_s_per_mtok": "CPU-s per 1 M tokens", "tokens_per_cpu_s": "tok per CPU-s", "memory_mb": "memory, MB",
    "shared": "shared arrivals", "kernel_stamps": "stamped by kernel", "start_s": "start to first request, s",
    "rate": "requests/s", "dispersion": "index of dispersion",
}  # fmt: skip


def main() -> None:
    """Play every scenario with every client, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter with vLLM, for vllm bench serve")
    parser.add_argument("--guidellm", metavar="PROGRAM")
    parser.add_argument("--aiperf", metavar="PROGRAM")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="", help="scenarios whose name holds this text")
    args = parser.parse_args()
    clients: dict[str, Callable[[str, Scenario], dict[str, float]]] = {"pytest-llmperf": ours}
    for name, make in {"vllm": vllm_bench, "guidellm": guidellm, "aiperf": aiperf}.items():
        if program := getattr(args, name):
            clients[name] = make(str(Path(program).absolute()))
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "truth_server"
        subprocess.run(["gcc", "-O2", "-o", str(binary), str(HERE / "truth_server.c"), "-lm"], check=True)
        for scenario in (one for one in SCENARIOS if args.only in one.what):
            mine = clients if scenario.peers else {"pytest-llmperf": ours}
            rows: dict[str, list[dict[str, float]]] = defaultdict(list)
            for _ in range(args.repeat):
                for name, play in mine.items():
                    with truth_server(binary, scenario) as url, thief(active=scenario.stolen):
                        told = play(url, scenario)
                        rows[name].append(compare(told, json.loads(get(f"{url}/__dump")), scenario))
            show(scenario, rows)


def show(scenario: Scenario, rows: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians of a scenario as a Markdown table."""
    columns = [name for name in SHOWN if any(name in one for found in rows.values() for one in found)]
    columns = [name for name in columns if name not in ("rate", "dispersion") or scenario.workload.is_open]
    print(f"\n{scenario.what}\n\n| client | {' | '.join(SHOWN[name] for name in columns)} |\n|---|{'---|' * len(columns)}")
    for client, found in rows.items():
        medians = [
            statistics.median([one[name] for one in found]) if all(name in one for one in found) else None for name in columns
        ]
        cells = ["" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" for value in medians]
        print(f"| {client} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
