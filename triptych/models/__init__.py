"""The networks. Import the module you need: `structure_vae`, `structure_flow`, `blocks`."""
