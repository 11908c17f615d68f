"""For mkdocs: links from a page to files outside docs/ lead to the repository."""


def on_page_markdown(markdown: str, config, **_) -> str:
    return markdown.replace("](../", f"]({config.repo_url.rstrip('/')}/blob/main/")
