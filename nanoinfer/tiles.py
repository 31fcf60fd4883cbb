"""The cuts of `tile_linear` that were measured to be the fastest, by the shapes of weights; `tall_gated_linear`'s.

Also, up to how many rows `thin_linear` and its like are faster than both.
"""

from typing import NamedTuple


class Tiles(NamedTuple):
    """How `tile_linear` cuts its work, see csrc/cuda/linear_tile.cuh. Where memory has room, any cut is right."""

    cols: int  # weight rows of a block: 40, 48, 56, 64 or 96, gated 80, 144 or 160
    tiles: int  # times 64 rows of x of a block: 1 to 3
    split: int  # blocks that share these, each with a part of the inputs: 1 to 8
    blocks: int  # blocks that share a multiprocessor's memory: 1 or 2


class GatedTiles(NamedTuple):
    """How `tall_gated_linear` cuts its work, see csrc/cuda/linear_gated.cuh. Every cut gives the same bits."""

    cols: int  # weight rows of a block, half of them gates: 128, 160, 192, 224 or 256
    down: int  # blocks of a cluster that are one below the other and share weights: 1 or 2
    across: int  # blocks of a cluster that are side by side and share x: 1, or 2 where down is 1
    band: int  # clusters one below the other, before the next to the right


# By weight's shape and whether it is gated: up to how many rows of x which tiles are fastest, or None where the library
# is. Of Qwen2.5's 0.5B, 1.5B and 7B, measured on an H200 in bf16, each product in a CUDA graph of its like. Comments:
# at so many rows us, and the library's, where gated with a kernel for silu.
TILES: dict[tuple[int, int, bool], tuple[tuple[int, Tiles | None], ...]] = {
    (1152, 896, False): (  # 32: 2.8, 4.0; 64: 3.1, 4.1; 96: 3.9, 4.3; 128: 4.0, 4.3; 256: 4.0, 4.5
        (64, Tiles(56, 1, 4, 1)), (96, Tiles(40, 2, 3, 1)), (128, Tiles(56, 1, 2, 1)), (256, Tiles(48, 1, 1, 2)),
    ),
    (896, 896, False): (  # 32: 2.8, 4.0; 64: 3.0, 4.0; 96: 3.7, 4.1; 128: 3.7, 4.1; 256: 3.7, 4.4
        (64, Tiles(56, 1, 4, 2)), (96, Tiles(40, 2, 3, 1)), (128, Tiles(40, 1, 2, 1)), (256, Tiles(40, 1, 1, 2)),
    ),
    (9728, 896, True): (  # 32: 7.8, 9.0; 64: 7.8, 9.2; 96: 8.5, 9.9; 128: 8.7, 10.3; 192: 9.7, 11.2; 256: 12.4, 14.0
        (64, Tiles(80, 1, 1, 2)), (128, Tiles(80, 2, 1, 1)), (192, Tiles(80, 3, 1, 1)), (256, Tiles(160, 2, 1, 1)),
    ),
    (896, 4864, False): (  # 32: 5.2, 7.5; 64: 5.8, 7.7; 96: 6.6, 7.9; 128: 7.4, 8.2; 256: 8.9, 9.6
        (32, Tiles(48, 1, 8, 2)), (64, Tiles(64, 1, 4, 1)), (96, Tiles(40, 2, 4, 1)), (128, Tiles(64, 1, 4, 1)),
        (256, Tiles(64, 2, 4, 1)),
    ),
    (2048, 1536, False): (  # 32: 3.7, 5.2; 64: 4.5, 5.3
        (32, Tiles(64, 1, 4, 2)), (64, Tiles(64, 1, 4, 1)),
    ),
    (1536, 1536, False): (  # 32: 3.4, 5.0; 64: 4.0, 5.1; 96: 5.0, 5.2
        (64, Tiles(40, 1, 3, 2)), (96, Tiles(56, 2, 3, 1)),
    ),
    (17920, 1536, True): (  # 32: 17.6, 20.2; 64: 19.0, 20.3; 96: 20.8, 21.4; 192: 23.3, 30.0; others: see TALL
        (32, Tiles(80, 1, 1, 2)), (64, Tiles(144, 1, 1, 1)), (96, Tiles(144, 2, 1, 1)), (128, None),
        (192, Tiles(144, 3, 1, 1)),
    ),
    (1536, 8960, False): (  # 32: 10.1, 11.9; 64: 10.9, 12.0; 96: 11.9, 12.2
        (32, Tiles(56, 1, 4, 1)), (64, Tiles(64, 1, 4, 1)), (96, Tiles(56, 2, 4, 1)),
    ),
    (3584, 3584, False): ((32, Tiles(40, 1, 1, 1)),),  # 32: 10.3, 11.2
    (37888, 3584, True): (  # 32: 74.2, 80.3; 64: 73.0, 80.9; 192: 20 less in a model's step
        (32, Tiles(160, 1, 1, 2)), (64, Tiles(144, 1, 1, 2)), (128, None), (192, Tiles(144, 3, 1, 1)),
    ),
    (3584, 18944, False): (  # 32: 38.5, 39.7; 64: 40.1, 43.0
        (32, Tiles(48, 1, 3, 2)), (64, Tiles(96, 1, 3, 1)),
    ),
}  # fmt: skip


# By weight's shape and whether it is gated, as well: up to how many rows of x thin_linear and its like are the fastest,
# where that is not all they take and a GPU has tile_linear. A model's step of 16 rows, us: 0.5B 670 -> 644, 1.5B
# 1,370 -> 1,280, 7B 4,499 -> 4,240 and some 50 less with qkv, which goes to the library; of 5 to 8 rows 7B 4,086 to
# 4,181 -> 4,018 to 3,996, while of 4 thin products are 1 % faster. (Of 8 rows both of
# 7B's wide products take 3.3 % off, down alone 0.5; gate_up alone adds 1.4.)
THIN_UP_TO: dict[tuple[int, int, bool], int] = {
    (896, 4864, False): 8,
    (17920, 1536, True): 8, (1536, 8960, False): 8,
    (4608, 3584, False): 8, (37888, 3584, True): 4, (3584, 18944, False): 4,
}  # fmt: skip


def measured_tiles(outputs: int, inputs: int, gated: bool, rows: int) -> Tiles | None:
    """For a weight [outputs, inputs] and so many rows of x; None where the library is faster, or nobody measured."""
    return next((tiles for most, tiles in TILES.get((outputs, inputs, gated), ()) if rows <= most), None)


PROCESSORS = 132  # of an H200

# For gated weights [2 outputs, inputs], numbers of rows up to TALL_ROWS where `tall_gated_linear` is the fastest even
# so. Of 1.5B and 7B, in captured steps of 8 layers under steady load: us a layer less than the library's with silu.
TALL: dict[tuple[int, int], tuple[tuple[range, GatedTiles], ...]] = {
    (17920, 1536): (  # 112: 5.0; 128: 5.4; 224: 3.4; 256: 3.0
        (range(97, 129), GatedTiles(160, 1, 1, 8)), (range(193, 257), GatedTiles(160, 2, 1, 8)),
    ),
    (37888, 3584): (  # 112: 7.5; 128: 8.1; 256: 12 in the whole model's step, which the card's power limits
        (range(97, 129), GatedTiles(160, 1, 1, 8)), (range(193, 257), GatedTiles(192, 2, 1, 8)),
    ),
}  # fmt: skip


def measured_tall(weight_rows: int, inputs: int, rows: int) -> GatedTiles | None:
    """For a gated weight [weight_rows, inputs] and so many rows of x, no more than TALL_ROWS."""
    return next((cut for where, cut in TALL.get((weight_rows, inputs), ()) if rows in where), None)


def gated_tiles(outputs: int, rows: int) -> GatedTiles:
    """For so many results of so many rows: the width with which the last block is through first.

    A block takes its tiles one after the other, each in a time that grows with cols + 85: per stage of 64 inputs it
    moves 128 (128 + cols) bytes into shared memory and 128 (128 + 2 cols) out of it, 128 a clock.
    """
    down, band = 2, 8

    def last(cols: int) -> int:
        tiles = -(-rows // (128 * down)) * -(-outputs // (cols // 2))
        return -(-tiles // (PROCESSORS // down)) * (cols + 85)

    return GatedTiles(min((256, 224, 192, 160, 128), key=last), down, 1, band)
