"""Several files are one checkpoint: how they are found, read as one, and written.

A layout is a module that recognises a document and its neighbours, since bytes do not tell: the
file of one rank is a torch zip like any other. It offers one function of these, or more:

    of_folder(folder, reading)            the document in a folder; None: it is not of this layout
    of_file(document, place, reading)     the document of which the one at `place` is a part or an
                                          index; None: it is not of this layout
    of_piece(place, reading)              the document of which a file holds pieces that no format
                                          can read by themselves

Uses `formats`, which read each file.
"""
