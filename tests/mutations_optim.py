"""Mutations of the optimizers' steps for mutation_check.py: (name, file, old, new, pytest arguments)."""

STEP, STATE, TABLE = "csrc/cpu/optim_step.cpp", "csrc/optim_state.h", "csrc/optim_table.h"
CHANGE = "x[i] * k.decay - c.step_size * new_m / denominator"
STEPS, LAYOUT = "tests/optim/test_steps.py -k cpu", "tests/optim/test_layout.py -k cpu"
ARGUMENTS = "tests/optim/test_step_arguments.py -k cpu"

OPTIM_MUTATIONS = [
    (
        "weight decay after the update",
        STEP,
        CHANGE,
        "(x[i] - c.step_size * new_m / denominator) * k.decay",
        STEPS,
    ),
    ("AdamW moves by its old momentum", STEP, CHANGE, CHANGE.replace("new_m", "m[i]"), STEPS),
    (
        "eps under the root",
        STEP,
        "std::sqrt(new_v) * c.root + k.eps",
        "std::sqrt(new_v + k.eps) * c.root",
        STEPS,
    ),
    ("an infinite square spreads", STEP, "!kGuarded || new_v < kInf", "true", STEPS),
    ("an infinite gradient spreads", STEP, "!kGuarded || std::fabs(new_m) < kInf", "true", STEPS),
    ("the sign of 0 is 1", STEP, "(c > 0 ? 1.0f : 0.0f)", "(c >= 0 ? 1.0f : 0.0f)", STEPS),
    (
        "Lion's sign of its new momentum",
        STEP,
        "const float c = k.beta1 * m[i] + k.rest1 * g[i];",
        "const float c = k.beta2 * m[i] + k.rest2 * g[i];",
        STEPS,
    ),
    (
        "a done page again",
        STEP,
        "row.count == 0 || tick_of(s.pages[row.page]) == s.tick",
        "!row.count",
        STEPS,
    ),
    ("ticks not set", STEP, "tick_of(s->pages[i]) = s->tick;", ";", STEPS),
    ("one word for four", STEP, "words[4 * c + k] = drawn[k][c]", "words[4 * c + k] = drawn[0][c]", STEPS),
    ("words by place in the piece", STEP, "piece.first + at, piece.stream", "at, piece.stream", STEPS),
    (
        "an infinite compensation",
        STEP,
        "chosen(std::fabs(difference) < kInf, difference, 0.0f)",
        "difference",
        STEPS,
    ),
    ("a gradient from the parameter's start", STEP, "row.first * size_of(parameter.grad_dtype)", "0", STEPS),
    (
        "all steps are the first one's",
        STEP,
        "if (row.step != known)",
        "if (known == 0)",
        STEPS,
    ),
    ("absmax of signed bits", STEP, "bits_of(x[i]) & 0x7fffffffu);", "bits_of(x[i]));", LAYOUT),
    (
        "absmax of the piece's first block",
        STEP,
        "piece.layout.absmax1) + block",
        "piece.layout.absmax1)",
        STEPS,
    ),
    ("midpoints rounded to nearest", STATE, "(nearest > middle ? 1 : 0)", "0", LAYOUT),
    (
        "a code below the least",
        STATE,
        "(below < kZeroCode ? kZeroCode - below : 0)",
        "(kZeroCode - below)",
        LAYOUT,
    ),
    ("subnormal blocks get codes", STATE, "absmax < kMinAbsmax ? 0.0f", "absmax == 0 ? 0.0f", LAYOUT),
    ("the stream of id 0", STATE, " | static_cast<uint64_t>(id) << 32", " | (id & 0)", STEPS),
    (
        "a bf16 rounding without its carry",
        STATE,
        "(magnitude + (word >> 16)) >> 16",
        "(magnitude >> 16) + (word >> 31)",
        STEPS,
    ),
    ("a piece past its parameter's end", TABLE, "row.first > n - row.count", "row.first > n", ARGUMENTS),
    ("a piece over the header", TABLE, "row.offset < kHeaderBytes", "row.offset < 0", ARGUMENTS),
]
