# verl. Updates go through memory there, so this is for launches: with a load format that reads files.
# Composed by verl's own configuration in tests/test_launchers.py.
python3 -m verl.trainer.main_ppo \
  actor_rollout_ref.rollout.name=sglang \
  actor_rollout_ref.rollout.load_format=auto \
  "+actor_rollout_ref.rollout.engine_kwargs.sglang.model_loader_extra_config='{\"enable_multithread_load\":true,\"enable_fast_load\":true}'" \
  '+ray_kwargs.ray_init.runtime_env.env_vars={WEIGHTLIFT_NUM_LOAD_THREADS: "8"}'
