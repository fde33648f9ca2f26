"""One file a rank, each what `torch.save` makes of a state dict in pieces.

    model_world_size_4_rank_0.pt, …       verl
    pytorch_model_fsdp_rank0.bin, …       accelerate
    ANYTHING_rank3.pt, model_3.pt, …      training code of one's own

What makes a file one of them is in it: tensors that are pieces (`distributed_tensors`). Its name
has its rank (so has the folder in the zip, by which a file that was renamed is known), and its
neighbours have the same name but for that. All of them have the same tree;
where one has a key that another lacks, it is taken. Pieces are joined; of what several ranks have,
one is taken where all are equal, and elsewhere it is refused, apart from the states of random
number generators, of which that of the lowest rank is taken, and named.

FSDP1 also saves parameters flat (LOCAL_STATE_DICT), one after another in a vector `_flat_param`,
and under their own names, where it keeps them, the part of each that a rank has, a view of its part
of the vector. Vectors are joined, and those parts are views of the whole vector then; the shapes of
the parameters, and without their names where each begins, are in no file: `edit.flat` takes them
from a target. Where a rank is missing, `recover` keeps a parameter that begins and ends where its
neighbours are there. What an optimizer keeps of a vector is as flat, and is left out.

Not every rank is needed: of replicas one is enough. What is missing is told by the piece that no
file has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.layouts.in_pieces import piece_in

if TYPE_CHECKING:
    from ckptfix.bytes.place import Place
    from ckptfix.formats.reading import Reading
    from ckptfix.tree.document import Document


def of_file(document: Document, place: Place, reading: Reading) -> Document | None:
    """The document of which the file at `place` is one rank's; None for a file of no pieces."""
    piece = piece_in(document.root)
    if piece is None:
        return None
    from ckptfix.layouts import ranks

    return ranks.joined(document, piece, place, reading)


def of_folder(folder: Place, reading: Reading) -> Document | None:
    """The document in a folder of such files; None for other folders."""
    from ckptfix.layouts import ranks

    return ranks.of_folder(folder, reading)
