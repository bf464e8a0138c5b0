"""Text of `docs/bench.md` around its tables."""

from typing import Final

INTRO: Final = """\
# The simulator

Written by `make bench`; every number stands in `benchmarks/results/` as JSON.

The simulator runs vLLM's own scheduler and KV-cache manager (prefix cache, chunked prefill, preemption, asynchronous
scheduling, KV-connector interface) in virtual time. Only the device is a model: a step costs a fixed time, its prefill
tokens at a constant rate, and one read of the weights and of the KV of every decoding call. The same input gives the
same trace, bit for bit; one run of 24 applications takes well under a minute on one core.

```
tokencake sim --workload code-writer --qps 1.0 --apps 24 --profile a800-qwen2.5-14b --policy stock+host --json out.json
tokencake sim --workload benchmarks/workloads/two-agents.json     # your own: see benchmarks/workloads/schema.json
tokencake sim --list
```

Cells are **end to end / mean application latency / 95th percentile** in seconds. All runs: Qwen2.5-14B on an A800 with
3,050 KV blocks, the set-up for which figures are published. One run per cell. The system is chaotic: nearly equal
constants give between 20 and 50 preemptions, so differences below 2 % are noise.
"""

POLICIES: Final = """\
| policy | what it is |
|---|---|
| `stock` | vLLM as it is: first come first served, prefix caching, chunked prefill |
| `stock+host` | stock with 100 GiB of host memory: stores what finishes, loads on a hit, forgets the least recent |
| `priority` | vLLM's priority policy, older application first, most work left first inside it; no host memory |
| `paper` | the published schedulers, both, with their constants, on the same host memory |
| `default` | TokenCake with its defaults: Space and Time Scheduler, on the same host memory |
| `time` | the Time Scheduler alone |
| `space`, `space+host` | the Space Scheduler alone, without host memory and on that of `stock+host` |
| `no-recompute` | bound: stock, where computing again a prefix that was lost takes no time |
| `unlimited` | bound: stock with 60,000 KV blocks |

`stock+host` is the baseline that counts: it has the memory that TokenCake has and knows nothing of agents.
"""

ON_CPU: Final = """\
A model of SmolLM2-135M's shape in a real vLLM, against the simulator with rates fitted to another workload just before
(`benchmarks/validate_cpu.py`). Hits must agree call by call, every makespan within 20 %.

Time is processor time: vLLM computes in one thread, a step takes what the processor spent on it, tools take what the
workload says. Wall time is no measure on a machine with other work, where the same workload took 13 to 29 s. What that
work still does through shared caches and memory moved the processor time of one workload from 12.8 to 16.4 s between
three executions; the rates, fitted a minute before, follow it in part. Over all three, 15 runs with 240 calls, no call
had other hits and the errors lay between -10.2 and +8.4 %. This is one of them.
"""

ON_SERVER: Final = """\
The same kind of workload over HTTP, in wall time, with the rates fitted to the steps that the server kept while it ran
another one (`benchmarks/validate_server.py`; `tokencake sim calibrate URL` does the same for your engine).
"""

RECORDED: Final = """\
## Your own run as a workload

`tokencake sim record SOURCE OUT.json` turns what an engine knows of its past calls into a workload; `SOURCE` is the URL
of an engine or a proxy, or a file with the answer to `GET /v1/tokencake/state`, or with a list of its pages.

- A call builds on the one before it in its session if its prompt is no shorter. What the prompt has more than that
  context counts as new text, results of tools included: the state does not send them apart.
- An answer that the next prompt is too short for, or of which the cache knew nothing, was not sent back as it was
  (`keeps_answer: false`).
- All tools of a call are one, from the first start to the last end. Agents inside it are found by `parent_call`.
- A call comes `after` the calls of other sessions of its application that were just over when it arrived.
- Time of 0.1 s and more with neither call nor tool (a human, plain code) is a local node, of which no engine hears.
- Applications that share a session, the turns of one thread, are one application.
- What sessions of one agent share at their beginning is the least that a first call found in the cache: a lower bound.

Not in it: calls without a hint, that is ordinary traffic; aborted and unfinished calls, tools without an end and calls
that the engine has forgotten, all of which the command counts. Prompts and answers are never read, only their lengths.
"""

CALIBRATED: Final = """\
## Your own machine as a profile

An engine started with `--additional-config '{"tokencake": {"measure": {"steps": 5000}}}'` keeps its newest steps: what
each computed and how long it took. `tokencake sim calibrate URL` fits the fixed cost of a step, the prefill rate and
the memory bandwidth to them and prints the profile. Give the engine a load that both prefills and only decodes first.
"""

WRONG: Final = """\
## Where the simulator is wrong

- **Fitted.** Prefill rate (7,600 tokens/s) and the fixed cost of a step (2 ms) were fitted to the published base at
  QPS 1.0; the length of a tool's result (247 tokens) to the published mean prompt. 1 ms and 2 ms fit equally well
  there; 2 ms was taken because it also fits QPS 0.05. So 0.1, 0.2 and 0.5 are predictions, 0.05 is one in part only.
- **Step time is linear.** No attention term that grows with the square of the context, no padding of CUDA graphs, no
  interference between copies and computation. A long prefill of a single call is too cheap, many short ones too dear.
- **Anything with a host tier is optimistic**, by our guess 5 %: the published offloading runs are slower than equal
  computed tokens explain here. The modelled tier stores at finish and at preemption, vLLM's connector as blocks fill;
  copies of one direction are served one after the other at full bandwidth, and finding a block costs nothing.
- **Scheduling is free.** The time that vLLM's Python takes is part of the fixed cost, whatever the number of calls.
  Serving (HTTP, tokenising, detokenising) is not there at all.
- **Answers have the length that the workload says.** No answer stops early, nothing is sampled.
- **`priority` runs the stock code with its flaw**: a victim that was already scheduled in the same step keeps prefix
  blocks that were never computed. Here that looks like hits; on a device it would be wrong KV.
- **Deep-research and react have no published counterpart**: context sizes and tool times are ours.
- `kv_held_by_stalled` counts blocks of a stalled agent that are still cached, sampled every 2 s.
- Profiles other than `a800-qwen2.5-14b` and `cpu-smollm2-135m` come from data sheets and have not been compared with a
  run; the CPU's rates differ from machine to machine and are fitted anew for the comparison above.
- **A client's own time** between two calls (graph code, HTTP) is not there: nothing happens between the end of a tool
  and the call that follows.
"""
