"""The emulator finds the mistakes that kernels of this kind die of: each is put into the source, one at a time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emulated_cuda import KERNELS
from hopper import Problem, load, start_build

# File, what is replaced, by what, and what the emulator must say: "wrong" results, or a message (as a pattern).
MISTAKES = {
    "none": ("wide.h", "", "", ""),
    "wide: copies not waited for": ("wide.h", "      wait_stage(p.stages);\n", "", "wrong"),
    "wide: stage overwritten while read": ("wide.h", "__syncthreads();  // the stage has", "// the stage has", "wrong"),
    "wide: the last but one adds up": (
        "wide.h", "*ticket != p.chunks - 1", "*ticket != p.chunks - 2", "wrong|counters",
    ),
    "wide: the counter stays": ("wide.h", "if (threadIdx.x == 0) p.counters[block] = 0;", "", "counters"),
    "wide: outputs read before they are staged": (
        "wide.h", "    __syncthreads();\n    const int column", "    const int column", "wrong",
    ),
    "wide: a barrier that not all reach": ("wide.h", "    wait_copies<0>();\n    __syncthreads();",
        "    wait_copies<0>();\n    if (threadIdx.x) __syncthreads();", "deadlock"),
    "narrow: copies not waited for": ("narrow.h", "        wait_stage(p.stages);\n", "", "wrong"),
    "narrow: sums written over stages in use": ("narrow.h", "wait_copies<0>();\n    __syncthreads();",
        "wait_copies<0>();", "wrong"),
    "the last group is not scaled": ("narrow.h", "      walk.flush();\n", "", "wrong"),
    "scales of the group before": ("pipeline.h", "grid += Stage::grid_words(p.scale_dtype);", "", "wrong"),
}  # fmt: skip

DRIVER = """
EXPORT int run{number}(const hf_gptq::LinearArguments* p, int, uint64_t seed, int resident, char* message) {{
  using namespace hf_gptq;
  std::vector<float> partials(wide_partials(p->M, p->N, 8), NAN);
  std::vector<int32_t> counters(wide_blocks(p->M, p->N), 0);
  const int code = emulated(*p, seed, 1, message, [&](LinearArguments q, const auto&) -> int {{
    emulate::settings.resident = resident;
    q.chunks = chunk_count(q.N, 64 * q.k_tiles);
    q.partials = partials.data();
    q.counters = counters.data();
    const Device little{{80, 1, q.M <= kNarrowRows ? 70 * 1024 : 24 * 1024}};  // two or three stages
    return q.M <= kNarrowRows ? mistake{number}::launch_narrow<Half, 4>(q, little, nullptr)
                              : mistake{number}::launch_wide_tokens<Half, 4, 1>(q, little, nullptr);
  }});
  for (int left : counters) {{
    if (left && !code) {{
      strcpy(message, "counters are not zero afterwards");
      return 1;
    }}
  }}
  return code;
}}
"""


def source() -> str:
    """A driver with one namespace per mistake."""
    text = '#include <math.h>\n#include "decode.h"\n#include "hf_gptq.h"\n#include "launch.h"\n#include "linear.h"\n'
    for number, (name, old, new, _) in enumerate(MISTAKES.values()):
        text += f"namespace hf_gptq {{\nnamespace mistake{number} {{\n"
        for file in ("pipeline.h", "narrow.h", "wide.h"):
            body = (KERNELS / "cuda" / file).read_text()
            body = body[body.index("namespace hf_gptq {") + 19 : body.rindex("}  // namespace hf_gptq")]
            assert file != name or old in body, (name, old)
            text += body.replace(old, new, 1) if file == name else body
        text += f"}}  // namespace mistake{number}\n}}\n" + DRIVER.format(number=number)
    return text


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("mistakes") / "mistakes.so"
    assert start_build(source(), library).wait() == 0
    return library


@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulator_finds_mistakes(built: Path, mistake: str) -> None:
    run = getattr(load(built), f"run{list(MISTAKES).index(mistake)}")
    expected, found = MISTAKES[mistake][3], set()
    for problem in (Problem(7, 280, 832, 32), Problem(3, 40, 4736, 32)):
        for seed in range(8):
            y, message = problem.run(run, seed, 3)
            if message:
                found.add(message)
            elif problem.wrong(y).any():
                found.add("wrong")
            if found and expected:
                break
    if expected:
        assert any(re.search(expected, what) for what in found), found
    else:
        assert not found
