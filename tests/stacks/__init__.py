"""Models inside other people's training stacks; ./dev test stacks installs those."""
