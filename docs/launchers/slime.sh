# slime, with weights pushed through a directory. slime is on no package index: the test takes this
# command apart and gives what it says of SGLang to SGLang's own parser.
ray job submit \
  --runtime-env-json='{"env_vars":{"WEIGHTLIFT_STAGE_GIB":"20","WEIGHTLIFT_STAGE_WATCH":"/shared/weights"}}' \
  -- python3 train.py \
  --update-weight-transport disk \
  --update-weight-disk-dir /shared/weights \
  --sglang-model-loader-extra-config '{"enable_multithread_load":true,"enable_fast_load":true}'
