"""Jobs on TPU VMs: the cloud's side, and the workers'."""
