from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FetchRequest(_message.Message):
    __slots__ = ("request_id", "table", "token_ids", "traceparent", "authorization")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    AUTHORIZATION_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    table: str
    token_ids: bytes
    traceparent: str
    authorization: str
    def __init__(self, request_id: _Optional[int] = ..., table: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., traceparent: _Optional[str] = ..., authorization: _Optional[str] = ...) -> None: ...

class FetchReply(_message.Message):
    __slots__ = ("request_id", "first", "records", "last", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    first: int
    records: bytes
    last: bool
    error: Error
    def __init__(self, request_id: _Optional[int] = ..., first: _Optional[int] = ..., records: _Optional[bytes] = ..., last: _Optional[bool] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("status", "message", "token_ids")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    status: str
    message: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, status: _Optional[str] = ..., message: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("table", "known")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    table: str
    known: str
    def __init__(self, table: _Optional[str] = ..., known: _Optional[str] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("manifest_json", "max_ids_per_fetch", "rows_port")
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    MAX_IDS_PER_FETCH_FIELD_NUMBER: _ClassVar[int]
    ROWS_PORT_FIELD_NUMBER: _ClassVar[int]
    manifest_json: str
    max_ids_per_fetch: int
    rows_port: int
    def __init__(self, manifest_json: _Optional[str] = ..., max_ids_per_fetch: _Optional[int] = ..., rows_port: _Optional[int] = ...) -> None: ...

class ListTablesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTablesReply(_message.Message):
    __slots__ = ("tables",)
    TABLES_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[Table]
    def __init__(self, tables: _Optional[_Iterable[_Union[Table, _Mapping]]] = ...) -> None: ...

class Table(_message.Message):
    __slots__ = ("name", "version", "published", "manifest_json")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    published: bool
    manifest_json: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., published: _Optional[bool] = ..., manifest_json: _Optional[str] = ...) -> None: ...
