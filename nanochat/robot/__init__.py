"""From the same model, motor commands: demonstrations, policies, rollouts and a server."""
