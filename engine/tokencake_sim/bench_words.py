"""What does `docs/bench.md` say around its tables?"""

from typing import Final

INTRO: Final = """\
# The bench

Written by `make bench`; every number stands in `benchmarks/results/` as JSON.

The bench runs vLLM's own scheduler and KV-cache manager (prefix cache, chunked prefill, preemption, asynchronous
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
| `no-recompute` | bound: stock, where computing again a prefix that was lost takes no time |
| `unlimited` | bound: stock with 60,000 KV blocks |

`stock+host` is the baseline that counts: it has the memory that TokenCake has and knows nothing of agents.
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
- **Answers have the length that the workload says.** Nobody stops early, nothing is sampled.
- **`priority` runs the stock code with its flaw**: a victim that was already scheduled in the same step keeps prefix
  blocks that were never computed. Here that looks like hits; on a device it would be wrong KV.
- **Deep-research and react have no published counterpart**: context sizes and tool times are ours.
- `kv_held_by_stalled` counts blocks of a stalled agent that are still cached, sampled every 2 s.
- Profiles other than `a800-qwen2.5-14b` come from data sheets and have not been compared with a run.
"""
