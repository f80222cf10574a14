"""Google Cloud Storage on this machine: the emulator of the package index, and what points its clients at it.

Three clients take part, and each is told in its own way: gcsfs (under epath), TensorStore (under Orbax) and Google's own (which
Orbax asks about the bucket). All of it is by environment variables, so that subprocesses are pointed there as well; what the
libraries of this process have already read of them is set beside.

Two things of the real service that the emulator lacks are added, since the clients live by them: conditions on an object's
generation, by which TensorStore makes sure that nobody else wrote its index in between, and the renaming of an object. Still
different from the real thing: lists come in one page, nobody is refused for want of rights, nothing is slow, throttled or lost
on the way, and there is no gRPC, so gcsfs must not ask for the bucket's kind by it.
"""

import functools
import logging
import os
import socketserver
from http import HTTPStatus

import fsspec
from gcp_storage_emulator import exceptions, server
from gcp_storage_emulator.handlers import objects

# Before gcsfs is imported, which reads the last of them only then.
os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "anything"  # TensorStore's, instead of a search for credentials
os.environ["FSSPEC_GCS_TOKEN"] = "anon"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


def _move(request, response, storage, *_, **__):
    """Renames an object within a bucket."""
    bucket, old, new = (request.params[k] for k in ("bucket_name", "object_id", "dest_object_id"))
    response.json(objects._copy(request.base_url, storage, bucket, old, bucket, new))
    storage.delete_file(bucket, old)


def _generation(request, storage) -> str:
    """The generation of the object that a request is about; 0 where there is none."""
    name = request.params.get("object_id") or request.query.get("name", [""])[0]
    if request.query.get("uploadType") == ["multipart"]:  # Google's own client names the object in the body
        name = name or request.data["meta"]["name"]
    try:
        return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
    except (exceptions.NotFound, KeyError):
        return "0"


def _conditional(handler):
    """The handler, called only if the request's conditions on the generation hold; it tells which one was read."""

    @functools.wraps(handler)
    def checked(request, response, storage, *_, **__):
        found = _generation(request, storage)
        if request.query.get("ifGenerationMatch", [found])[0] != found:
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif request.query.get("ifGenerationNotMatch", [""])[0] == found:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage)
            response["x-goog-generation"] = found

    return checked


@functools.cache
def _complete() -> None:
    """Adds what is missing, once a process."""
    route = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<dest_object_id>.*[^/]+)$"
    every = ((route, {server.POST: _move}), *server.HANDLERS)
    server.HANDLERS = tuple((path, {method: _conditional(h) for method, h in methods.items()}) for path, methods in every)
    # A client may hang up on an answer that it no longer needs; that is no event.
    socketserver.BaseServer.handle_error = lambda *_: None
    for name in ("gcp_storage_emulator", "api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def start(*buckets: str) -> server.Server:
    """Starts it, in memory, with these buckets, and points the clients at it. `stop()` ends it."""
    _complete()
    running = server.create_server("127.0.0.1", 0, in_memory=True)
    running.start()
    for name in buckets:
        server.buckets.create_bucket(name, running._storage)
    url = f"http://127.0.0.1:{running._api._httpd.server_address[1]}"
    os.environ.update(STORAGE_EMULATOR_HOST=url, TENSORSTORE_GCS_HTTP_URL=url)
    fsspec.config.conf.setdefault("gcs", {})["token"] = "anon"
    return running
