"""What the door lets in: routes, headers, web sites and bodies. Decisions only, no I/O."""
