"""The few things of Automatic1111 and Forge that the tab uses, as they behave there; named as there."""
