"""The state model and the control loop: compare the desired state with the observed one, start and stop processes."""
