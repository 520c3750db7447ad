"""`peftlight push`: an adapter or a merged model goes to the hub."""


def push(
    adapter: str,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base: str | None = None,
) -> None:
    """Publish an adapter, or what `peftlight merge` wrote, on the Hugging Face hub, with its card.

    The files go up in one commit: config, tensors, record and card of an adapter; the files of a model that
    transformers loads. Logs, checkpoints and paths of this machine stay here. The token is that of `hf auth login` or
    HF_TOKEN.

    Args:
        adapter: folder of the adapter, of the run that trained it, or of the merged model.
        repo: USER/NAME on the hub; made if it is not there.
        private: whether nobody else may see the repository.
        revision: branch of the repository; made if it is not there.
        message: what the commit says.
        base: what the adapter's base is called on the hub, if the adapter was trained on a local folder.
    """
    from peftlight.console import say
    from peftlight.handover.hub import push_files
    from peftlight.handover.publishing import publication
    from peftlight.handover.serving import serving_lines

    found = publication(adapter, base)
    pushed = push_files(found, repo, private, revision, message)
    for remark in pushed.remarks:
        say(f"  {remark}")
    say(f"published {', '.join(found.files)}" if pushed.is_new else "nothing to change: the repository has these files")
    say(f"{pushed.url}\ncommit {pushed.commit}\n")
    say("\n".join(serving_lines(adapter)))
