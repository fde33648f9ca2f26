# The main job of ckptfix, as a story: `make demo`. Ends with an error if a step does not act as announced.
set -eu

fixtures=$(cd "$(dirname "$0")" && pwd)/fixtures
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

cp "$fixtures/dataparallel_cuda_training.pt" "$work/trained.pt"
cp "$fixtures/foonet.py" "$work"
cd "$work"
export CUDA_VISIBLE_DEVICES= # a machine that has a GPU plays one that has none

bold='' plain=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$(printf '\033[1m') plain=$(printf '\033[0m')
fi

say() { printf '\n%s# %s%s\n' "$bold" "$*" "$plain"; }

# works COMMAND: show it, run it, and insist that it succeeds.
works() {
    printf '\n$ %s\n' "$1"
    eval "$1" || { echo "demo: exit code $? where 0 was announced" >&2; exit 1; }
}

# says_no COMMAND: the same for exit code 1, "the answer is no".
says_no() {
    printf '\n$ %s\n' "$1"
    code=0
    eval "$1" || code=$?
    [ "$code" -eq 1 ] || { echo "demo: exit code $code where 1 was announced" >&2; exit 1; }
    echo "(exit code 1)"
}

# fails_with TEXT COMMAND: insist that Python ends in an error with TEXT; of the traceback, only the error is shown.
fails_with() {
    printf '\n$ %s\n' "$2"
    if eval "$2" >traceback.txt 2>&1; then
        echo "demo: it succeeded where '$1' was announced" >&2
        exit 1
    fi
    sed -n '/^[A-Za-z_.]*Error/,$p' traceback.txt >error.txt
    fold -s -w 100 error.txt
    grep -q "$1" error.txt || { cat traceback.txt; echo "demo: '$1' was announced" >&2; exit 1; }
}

say "Someone trained FooNet under nn.DataParallel on a GPU and sent trained.pt. We load it as one does:"
cat >load.py <<'PYTHON'
import sys

import torch
from foonet import FooNet

checkpoint = torch.load(*sys.argv[1:], weights_only=True)  # a file, and map_location if given

model = FooNet(neural_num=4, layers=3)
model.load_state_dict(checkpoint["model_state_dict"], strict=True)

moments = len(checkpoint["optimizer_state_dict"]["state"])
print(f"All keys match. Epoch {checkpoint['epoch']}; optimizer state of {moments} parameters.")
PYTHON
works "cat load.py"

say "This machine has no GPU, so torch refuses:"
fails_with "CUDA device" "python load.py trained.pt"

say "With map_location it gets further, and stops at the names that DataParallel gave:"
fails_with "Missing key" "python load.py trained.pt cpu"

say "What is in the file? Nothing is loaded or run to find out."
works "ckptfix inspect trained.pt"

say "Would it load into this model?"
says_no "ckptfix check trained.pt --model foonet.py:FooNet --init '{\"neural_num\": 4, \"layers\": 3}'"

say "Two repairs. Optimizer and epoch come along, and trained.pt stays as it is."
works "ckptfix strip-prefix trained.pt stripped.pt"
works "ckptfix to-cpu stripped.pt repaired.pt"

say "The same question, and the same script with nothing changed:"
works "ckptfix check repaired.pt --model foonet.py:FooNet --init '{\"neural_num\": 4, \"layers\": 3}'"
works "python load.py repaired.pt"
