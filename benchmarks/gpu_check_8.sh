#!/bin/bash
# For owners of eight GPUs: images/s at 1, 2, 4 and 8 with 64 and 512 images each, and whether an
# error of one process ends all within a minute and is printed once. DATA is any source of images.
set -u
cd "$(dirname "$0")/.."
data=${1:?usage: gpu_check_8.sh DATA}
out=$(mktemp -d)
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
for gpus in 1 2 4 8; do
    for images in 64 512; do
        torchrun --standalone --nproc-per-node "$gpus" -m allmlp train scratch --data "$data" \
            --set model.name=mixer_b16 --set model.image_size=224 --set epochs=null --set steps=60 \
            --set evaluate_every=60 --batch-size $((gpus * images)) --set keep_checkpoints=0 \
            --output "$out/$gpus-$images" >"$out/log" 2>&1 || tail -n 20 "$out/log"
        python3 - "$out/$gpus-$images/metrics.jsonl" "$gpus" "$images" <<'PY'
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
first, last = lines[20], lines[-1]
speed = (last["step"] - first["step"]) * int(sys.argv[2]) * int(sys.argv[3])
print(f"{sys.argv[2]} GPUs, {sys.argv[3]} images each: "
      f"{speed / (last['seconds'] - first['seconds']):,.0f} images/s")
PY
    done
done
cat >"$out/fails.py" <<'PY'
from allmlp.cli.main import main
from allmlp.errors import UserError
from allmlp.training import train as loop

def failing(self, step, batch, train_step=loop.Trainer.train_step):
    if step == 5 and self.world.rank == 3:
        raise UserError("rank 3 fails on purpose")
    train_step(self, step, batch)

loop.Trainer.train_step = failing
main()
PY
began=$SECONDS
torchrun --standalone --nproc-per-node 8 "$out/fails.py" train scratch --data "$data" \
    --set epochs=null --set steps=60 --batch-size 512 --output "$out/fails" >"$out/log" 2>&1
echo "an error of rank 3 ended all after $((SECONDS - began)) s (with the start) and was printed" \
    "$(grep -c 'error: .*fails on purpose' "$out/log") times"
rm -r "$out"
