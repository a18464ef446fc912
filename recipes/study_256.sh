#!/bin/sh
# DiT beside "butterflies" at 256x256: the same latents in the same order, the same training FLOPs, the same decoder.
#
#     sh recipes/study_256.sh TRAIN VALIDATION
#
# After recipes/butterflies.sh, whose folder it goes on in. Every command resumes. DiT takes two hours of a CPU core with
# bfloat16; a curve of 1,000 samples a setting an hour. Needs: pip install ".[all]" stlpips-pytorch.
set -eu
train=$1 validation=$2
runs=${RUNS:-runs/butterflies}
decoder=src/ecar/bundled/butterflies/tokenizer

# As many steps as cost the training FLOPs of "butterflies" (1.4e15). All blocks of a DiT are in its head.
ecar train --model dit --data "$runs/latents" --flip --out "$runs/dit" --resolution 256 --preset 256x4x1+6 --patch 2 \
    --compile --optimizer muon --lr 2e-3 --batch-size 112 --max-steps 5588 --decay 0.4 --ema 0.99 0.998

# Distances to the training photographs, of which there are enough; the floor is the held-out ones.
curve() {
    out=$1; shift
    python benchmarks/curve.py --data "$train" --train-data "$validation" --vgg --num 1000 --out "$runs/$out.jsonl" "$@"
}
curve ecar --model butterflies --settings 2,2:3,5 3,2:3,5 4,3:3,5 6,4:3,5 12,8:3,5
curve dit --model "$runs/dit/final" --decoder "$decoder" --settings 10:3 25:3 50:3

# Seconds need a quiet machine.
python benchmarks/seconds.py --ecar "$runs/ecar.jsonl" --ecar-model butterflies --dit "$runs/dit.jsonl" \
    --dit-model "$runs/dit/final" --dit-decoder "$decoder" --images 20 --out "$runs/seconds.json"
python benchmarks/compare.py --ecar "$runs/ecar.jsonl" --dit "$runs/dit.jsonl" --seconds "$runs/seconds.json" \
    --name comparison --out results/butterflies_dit
python benchmarks/side_by_side.py --systems "ECAR=butterflies=6,4:3,5" "DiT=$runs/dit/final=25:3" \
    --decoder "$decoder" --data "$validation" --classes 6 --per-class 2 --out results/butterflies_dit/side_by_side.jpg
