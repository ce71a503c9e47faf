"""Deprecated: only nanochat.robot.policy is left here, for one release."""
