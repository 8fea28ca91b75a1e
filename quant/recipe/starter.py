"""The recipe that `qserve recipe init` writes: every section, with comments."""

STARTER = """\
# A qserve recipe: `qserve run {name}` quantizes, judges, holds the result against the gates and
# publishes it. Paths start at this file's folder. `qserve recipe schema` prints the JSON Schema.
version: 1

# A folder of safetensors, a .gguf file or a hub id (owner/name).
model: {model}

quantize:
  method: awq            # {methods}
  # bits: 4              # what the method stores, if it has a choice
  # group_size: 64       # inputs that share a scale; the coarsest that fits every layer
  # avg_bits: 4.25       # or max_size: 90MB: bits and groups chosen for each layer by measurement
  # overrides:           # other settings for layers whose name matches; 16 bits leaves them alone
  #   - {{layers: down_proj, bits: 8, group_size: 32}}
  # ignore: [lm_head]    # regular expressions; what matches stays in 16 bits

calibration:
  text: builtin          # a file, hub:OWNER/NAME, builtin, or self (what the model itself writes)
  samples: 32
  seq_len: 512

# Figures beside the float model, on a text that calibration did not see.
evaluate:
  text: python-topics    # a UTF-8 file, or Python's help topics, which every machine has
  windows: 48
  seq_len: 512

# A result beyond a limit is not published, and the exit code is 7.
gates:
  max_kl: 0.15
  max_ppl_increase: 10%
  min_top1: 80%
  # max_size: 120MB

# The result is tried before it is published; a check that fails counts like a gate.
checks:
  inspect: true          # every tensor is read again, nothing is wrong
  # loads_in: [vllm, transformers, sglang]   # by the rules that `qserve inspect --for` knows
  generate: true         # continues a prompt with finite logits

output:
  folder: {output}
  overwrite: false

reports:
  # json: report.json
  # markdown: report.markdown  # also appended to $GITHUB_STEP_SUMMARY
  # junit: report.xml
  html: report.html
"""
