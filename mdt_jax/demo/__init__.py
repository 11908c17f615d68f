"""A page in the browser: draw, watch, inpaint and follow a run: python -m mdt_jax.demo.

The page is a form over the commands: `forms` turns what was entered into the flags of
`mdt_jax.sample` or `mdt_jax.inpaint`, `jobs` runs them one after another with weights that are
loaded once, `handlers` answers the buttons, and `layout` is the form, made with gradio.
"""
