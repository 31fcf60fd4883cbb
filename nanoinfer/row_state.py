"""Columns of the device's table of running requests: one int32 row of ROW_STATE_WIDTH a request.

Floats are stored by their bits. `csrc/row_state.h` holds the same columns for the kernels; a test compares the two.
"""

LAST_TOKEN = 0  # the newest token, the only one whose KV is not yet in the cache
LENGTH = 1  # tokens the row has, the newest included, once the step that was prepared last is done
SEED_LO = 2  # key of the row's random numbers, low and high half
SEED_HI = 3
TEMPERATURE = 4  # float; 0 is greedy
TOP_K = 5  # 0: off
TOP_P = 6  # float in (0, 1]
MIN_P = 7  # float in [0, 1]
REPETITION_PENALTY = 8  # float > 0; 1: off
PRESENCE_PENALTY = 9  # float in [-2, 2]; 0: off
FREQUENCY_PENALTY = 10  # float in [-2, 2]; 0: off
PROMPT_LENGTH = 11  # tokens that the request came with; what follows them is its output, recomputed or not
ROW_STATE_WIDTH = 16  # a power of two, so that a row is one 64-byte line; columns 12 to 15 are free

# Bits of the fourth column of a chunk in the step message: (row, start, end, flags).
FLAG_SAMPLE = 1  # the chunk's last token wants logits and a sampled successor
FLAG_STORE = 2  # K and V are written; off when the only token is recomputed into a shared block
