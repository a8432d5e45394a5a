"""A Hub on loopback: the part of the Hub's HTTP protocol that publishing and loading a model use.

Create, visibility, branches, preupload, LFS (basic and multipart), commits in ndjson, file lists, resolve; of data
sets, in `hub.repos["datasets/ORG/NAME"]`, what streaming asks for: file lists, and ranges of files. It keeps everything
in memory, counts what it is sent, and can be told to fail. It wants the token in every request to the Hub
itself, and no token in those to the storage, which are signed in reality.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "SecretOfTheTest0123456789abcdefgh"
ROUTES = []


class Refusal(Exception):
    """An HTTP status, with the header that tells huggingface_hub which of its errors it is."""

    def __init__(self, status, code=None, message=""):
        self.status, self.code, self.message = status, code, message


class Repo:
    def __init__(self, private):
        self.private = private
        self.branches = {"main": {}}  # branch -> {path: content}
        self.heads = {"main": hashlib.sha1(b"first").hexdigest()}
        self.commits = []  # (branch, summary, {path: what}) of every commit


class HubServer:
    """with HubServer() as hub: hub.url, hub.repos, hub.uploads ... Everything may be read between requests."""

    def __init__(self, token=TOKEN, part_size=None, known_users=("user",)):
        self.token, self.part_size, self.known_users = token, part_size, known_users
        self.repos: dict[str, Repo] = {}
        self.sent: dict[str, int] = {}  # bytes of each file of a data set that were asked for
        self.storage: dict[str, bytes] = {}  # LFS: sha256 -> content
        self.parts: dict[str, dict[int, bytes]] = {}
        self.uploads: list[tuple[str, int]] = []  # (sha256, bytes) that arrived whole in the storage
        self.received = 0  # bytes of bodies sent to the storage, those of broken uploads included
        self.requests: list[tuple[str, str]] = []
        self.leaks: list[str] = []  # requests to the storage that carried a token
        self.fail: dict[str, int] = {}  # substring of a path -> status to answer
        self.failure = "told to fail"  # what it says then
        self.drop: tuple[str, int] | None = None  # (sha256, bytes of it after which its connections are cut)
        self.of_dropped = 0
        self.reached_drop = threading.Event()
        self.hang_at_drop = False  # instead of cutting: never answer
        self.lock = threading.Lock()

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo, branch="main") -> dict[str, bytes]:
        return self.repos[repo].branches[branch]

    # ---- HTTP

    def answer(self, handler):
        path, _, query = handler.path.partition("?")
        self.requests.append((handler.command, path))
        try:
            if path.startswith("/storage/"):
                if "Authorization" in handler.headers:
                    self.leaks.append(path)
                body = self.read_storage(handler)
                if body is None:
                    handler.close_connection = True
                    return
            else:
                body = b"".join(self.chunks(handler))
                self.check_token(handler, path)
            for part, status in self.fail.items():
                if part in path:
                    raise Refusal(status, message=self.failure)
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == handler.command.replace("HEAD", "GET"):
                    groups = [group and urllib.parse.unquote(group) for group in match.groups()]
                    status, headers, content = function(self, *groups, body=body, query=query)
                    if status == 200 and (asked := handler.headers.get("Range")):
                        status, headers, content = part_of(asked, headers, content)
                    if path.startswith("/datasets/") and handler.command == "GET":
                        name = path.rpartition("/")[2]
                        self.sent[name] = self.sent.get(name, 0) + len(content)
                    break
            else:
                raise Refusal(404, message=f"no route {handler.command} {path}")
        except Refusal as refusal:
            status, content = refusal.status, json.dumps({"error": refusal.message}).encode()
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            if refusal.message:
                headers["X-Error-Message"] = refusal.message
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)

    def check_token(self, handler, path):
        given = handler.headers.get("Authorization")
        if given == f"Bearer {self.token}":
            return
        if given is not None:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        match = re.match(r"/(?:api/models/|(?:api/)?(datasets/))?([\w.-]+/[\w.-]+)", path)
        repo = self.repos.get((match[1] or "") + match[2].removesuffix(".git")) if match else None
        if handler.command not in ("GET", "HEAD") or repo is None or repo.private:
            raise Refusal(401, "RepoNotFound", "Invalid username or password.")

    def chunks(self, handler):
        if handler.headers.get("Transfer-Encoding") == "chunked":
            while size := int(handler.rfile.readline().split(b";")[0], 16):
                yield handler.rfile.read(size)
                handler.rfile.readline()
            handler.rfile.readline()
            return
        left = int(handler.headers.get("Content-Length", 0))
        while left:
            data = handler.rfile.read(min(left, 1 << 16))
            if not data:
                return
            left -= len(data)
            yield data

    def read_storage(self, handler):
        """The body, or None where the connection is to be cut."""
        body = bytearray()
        for data in self.chunks(handler):
            with self.lock:
                self.received += len(data) if handler.command == "PUT" else 0
                chosen = self.drop is not None and self.drop[0] in handler.path
                self.of_dropped += len(data) if chosen else 0
                stop = chosen and self.of_dropped > self.drop[1]
            if stop:
                self.reached_drop.set()
                if self.hang_at_drop:
                    threading.Event().wait(60)
                return None
            body += data
        return bytes(body)

    def repo(self, name, revision=None):
        if name not in self.repos:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        repo = self.repos[name]
        if revision is None:
            return repo
        branch = next((b for b, head in repo.heads.items() if revision in (b, head)), None)
        if branch is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, branch


def part_of(asked, headers, content):
    """The answer to a request for a range of bytes."""
    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
    last = min(int(last or len(content)), len(content) - 1)
    headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
    return 206, headers, content[int(first) : last + 1]


def route(method, pattern):
    def register(function):
        ROUTES.append((method, pattern, function))
        return function

    return register


def reply(value, status=200):
    return status, {}, json.dumps(value).encode()


NAME = r"([\w.-]+/[\w.-]+)"


@route("POST", "/api/repos/create")
def create(hub, body, query):
    asked = json.loads(body)
    if asked["organization"] not in hub.known_users:
        raise Refusal(403, message=f"You don't have the rights to create a model under {asked['organization']}")
    name = f"{asked['organization']}/{asked['name']}"
    if name in hub.repos:
        raise Refusal(409, message="You already created this model repo")
    # huggingface_hub 1.5 says it by "private"
    hub.repos[name] = Repo(asked.get("visibility") == "private" or asked.get("private") is True)
    return reply({"url": f"{hub.url}/{name}", "name": name})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, body, query):
    content = json.loads(body)["content"]
    if not content.startswith("---\n"):
        return reply({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    return reply({"errors": [], "warnings": []})


@route("GET", f"/api/models/{NAME}(?:/revision/([^/]+))?")
def model_info(hub, name, revision, body, query):
    repo, branch = hub.repo(name, revision or "main")
    siblings = [{"rfilename": path} for path in sorted(repo.branches[branch])]
    info = {"_id": "1", "id": name, "modelId": name, "private": repo.private, "sha": repo.heads[branch]}
    return reply(info | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})


@route("GET", f"/api/models/{NAME}/tree/([^/]+)/?")
def tree(hub, name, revision, body, query):
    repo, branch = hub.repo(name, revision)
    return reply([describe(hub, path, content) for path, content in sorted(repo.branches[branch].items())])


def describe(hub, path, content):
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    sha = hashlib.sha256(content).hexdigest()
    if sha in hub.storage:
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
    return entry


@route("POST", f"/api/models/{NAME}/branch/(.+)")
def make_branch(hub, name, branch, body, query):
    repo = hub.repo(name)
    if branch in repo.branches:
        raise Refusal(409, message=f"Reference already exists: {branch}")
    repo.branches[branch] = dict(repo.branches["main"])
    repo.heads[branch] = hashlib.sha1(f"{name} {branch}".encode()).hexdigest()
    return reply({})


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def remote_oid(hub, content):
    """As the Hub's preupload: the git blob's id, for LFS the sha256."""
    sha = hashlib.sha256(content).hexdigest()
    return sha if sha in hub.storage else git_oid(content)


@route("POST", f"/api/models/{NAME}/preupload/(.+)")
def preupload(hub, name, revision, body, query):
    repo, branch = hub.repo(name, revision)
    answers = []
    for file in json.loads(body)["files"]:
        large = file["path"].endswith(".safetensors") or file["size"] > 10 << 20
        answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if file["path"] in repo.branches[branch]:
            answer["oid"] = remote_oid(hub, repo.branches[branch][file["path"]])
        answers.append(answer)
    return reply({"files": answers})


@route("POST", rf"/{NAME}\.git/info/lfs/objects/batch")
def lfs_batch(hub, name, body, query):
    hub.repo(name)
    answers = []
    for asked in json.loads(body)["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in hub.storage:
            place = f"{hub.url}/storage/{asked['oid']}"
            upload = {"href": place, "header": {}}
            if hub.part_size and asked["size"] > hub.part_size:
                count = -(-asked["size"] // hub.part_size)
                upload = {"href": f"{place}/complete", "header": {"chunk_size": str(hub.part_size)}}
                upload["header"] |= {str(number): f"{place}/{number}" for number in range(1, count + 1)}
            verify = {"href": f"{hub.url}/api/{name}/verify", "header": {}}
            answer["actions"] = {"upload": upload, "verify": verify}
        answers.append(answer)
    return reply({"transfer": "basic", "objects": answers})


def store(hub, sha, content):
    if hashlib.sha256(content).hexdigest() != sha:
        raise Refusal(422, message="the content is not what its sha256 says")
    hub.storage[sha] = content
    hub.uploads.append((sha, len(content)))


@route("PUT", "/storage/([0-9a-f]{64})")
def put(hub, sha, body, query):
    store(hub, sha, body)
    return 200, {"ETag": '"whole"'}, b""


@route("PUT", "/storage/([0-9a-f]{64})/([0-9]+)")
def put_part(hub, sha, number, body, query):
    hub.parts.setdefault(sha, {})[int(number)] = body
    return 200, {"ETag": f'"{number}"'}, b""


@route("POST", "/storage/([0-9a-f]{64})/complete")
def complete(hub, sha, body, query):
    parts = [hub.parts[sha][part["partNumber"]] for part in json.loads(body)["parts"]]
    store(hub, sha, b"".join(parts))
    return reply({})


@route("POST", f"/api/{NAME}/verify")
def verify(hub, name, body, query):
    asked = json.loads(body)
    if len(hub.storage.get(asked["oid"], b"")) != asked["size"]:
        raise Refusal(404, message="not there")
    return reply({})


@route("POST", f"/api/models/{NAME}/commit/(.+)")
def commit(hub, name, revision, body, query):
    repo, branch = hub.repo(name, revision)
    lines = [json.loads(line) for line in body.splitlines()]
    assert lines[0]["key"] == "header"
    files, changes = dict(repo.branches[branch]), {}
    for line in lines[1:]:
        value = line["value"]
        changes[value["path"]] = line["key"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.storage:
                raise Refusal(400, message=f"the LFS object of {value['path']} is not there")
            files[value["path"]] = hub.storage[value["oid"]]
        elif line["key"] == "deletedFile":
            files.pop(value["path"])
        else:
            raise Refusal(400, message=line["key"])
    repo.branches[branch] = files
    repo.heads[branch] = hashlib.sha1(body).hexdigest()
    repo.commits.append((branch, lines[0]["value"]["summary"], changes))
    url = f"{hub.url}/{name}/commit/{repo.heads[branch]}"
    return reply({"commitUrl": url, "commitOid": repo.heads[branch], "pullRequestUrl": None})


@route("GET", f"/{NAME}/resolve/([^/]+)/(.+)")
def resolve(hub, name, revision, path, body, query):
    repo, branch = hub.repo(name, revision)
    if path not in repo.branches[branch]:
        raise Refusal(404, "EntryNotFound", f"{path} does not exist")
    content = repo.branches[branch][path]
    headers = {"ETag": f'"{remote_oid(hub, content)}"', "X-Repo-Commit": repo.heads[branch]}
    return 200, headers | {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}, content


# ---- data sets


@route("GET", f"/api/datasets/{NAME}(?:/revision/(.+))?")
def dataset_info(hub, name, revision, body, query):
    repo, branch = hub.repo(f"datasets/{name}", revision or "main")
    siblings = [{"rfilename": path} for path in sorted(repo.branches[branch])]
    info = {"_id": "1", "id": name, "private": repo.private, "sha": repo.heads[branch], "siblings": siblings}
    return reply(info | {"tags": [], "downloads": 0, "likes": 0, "disabled": False, "gated": False})


@route("GET", f"/api/datasets/{NAME}/tree/([^/]+)(?:/(.*))?")
def dataset_tree(hub, name, revision, folder, body, query):
    repo, branch = hub.repo(f"datasets/{name}", revision)
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    deep, entries = "recursive=true" in query.lower(), {}
    for path, content in sorted(repo.branches[branch].items()):
        if path.startswith(prefix):
            first, _, rest = path[len(prefix) :].partition("/")
            if rest:
                entries[prefix + first] = {"type": "directory", "path": prefix + first, "size": 0, "oid": "0" * 40}
            if not rest or deep:
                entries[path] = describe(hub, path, content)
    if not entries:
        raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
    return reply(list(entries.values()))


@route("POST", f"/api/datasets/{NAME}/paths-info/([^/]+)")
def dataset_paths(hub, name, revision, body, query):
    repo, branch = hub.repo(f"datasets/{name}", revision)
    asked = urllib.parse.parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
    files = repo.branches[branch]
    found = [describe(hub, path, files[path]) for path in asked if path in files]
    folders = [path for path in asked if any(file.startswith(f"{path}/") for file in files)]
    return reply([*found, *({"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders)])


@route("GET", f"/datasets/{NAME}/resolve/([^/]+)/(.+)")
def dataset_file(hub, name, revision, path, body, query):
    return resolve(hub, f"datasets/{name}", revision, path, body, query)
