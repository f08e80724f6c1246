"""JSON schemas of what the manifests in k8s/ use: KubeRay's RayCluster, RayJob and RayCronJob (ray.io/v1), and kinds of
Kubernetes itself.

Written by hand after reading the documented API, for KubeRay 1.6: no package was found that ships KubeRay's own CRDs.
Keys that exist but that the manifests do not use are left out where there are many. An unknown key is an error at every
level.
"""

from typing import Any

Schema = dict[str, Any]
STRING: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
BOOL: Schema = {"type": "boolean"}
STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
QUANTITY: Schema = {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}


def items(schema: Schema, at_least: int = 1) -> Schema:
    """A list."""
    return {"type": "array", "items": schema, "minItems": at_least}


def record(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with these keys and no others."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = record({"requests": QUANTITIES, "limits": QUANTITIES})
METADATA = record({"name": NAME}, {"namespace": NAME, "labels": STRINGS, "annotations": STRINGS})
REFERENCE = record({"name": NAME}, {"optional": BOOL})
ENV_FROM: Schema = {"oneOf": [record({"configMapRef": REFERENCE}), record({"secretRef": REFERENCE})]}
VOLUME: Schema = {
    "oneOf": [
        record({"name": NAME, "emptyDir": record({}, {"medium": {"enum": ["", "Memory"]}, "sizeLimit": QUANTITY})}),
        record({"name": NAME, "persistentVolumeClaim": record({"claimName": NAME}, {"readOnly": BOOL})}),
    ]
}
HEADER = record({"name": STRING, "value": STRING})
PROBE = record(
    {"httpGet": record({"path": STRING, "port": PORT}, {"httpHeaders": items(HEADER)})},
    {"periodSeconds": COUNT, "failureThreshold": COUNT, "timeoutSeconds": COUNT, "initialDelaySeconds": COUNT},
)
CONTAINER = record(
    {"name": NAME, "image": STRING, "resources": RESOURCES},
    {
        "imagePullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
        "command": items(STRING),
        "args": items(STRING),
        "env": items(record({"name": STRING}, {"value": {"type": "string"}})),
        "envFrom": items(ENV_FROM),
        "ports": items(record({"containerPort": PORT}, {"name": NAME, "protocol": {"enum": ["TCP", "UDP"]}})),
        "volumeMounts": items(record({"name": NAME, "mountPath": STRING}, {"readOnly": BOOL, "subPath": STRING})),
        "readinessProbe": PROBE,
        "livenessProbe": PROBE,
    },
)
TOLERATION = record(
    {"key": STRING},
    {
        "operator": {"enum": ["Exists", "Equal"]},
        "value": STRING,
        "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
    },
)
POD = record(
    {"containers": items(CONTAINER)},
    {
        "serviceAccountName": NAME,
        "securityContext": record(
            {}, {"runAsNonRoot": BOOL, "runAsUser": COUNT, "runAsGroup": COUNT, "fsGroup": COUNT}
        ),
        "nodeSelector": STRINGS,
        "tolerations": items(TOLERATION),
        "imagePullSecrets": items(record({"name": NAME})),
        "volumes": items(VOLUME),
    },
)
TEMPLATE = record({"spec": POD}, {"metadata": record({}, {"labels": STRINGS, "annotations": STRINGS})})
HEAD_GROUP = record(
    {"rayStartParams": STRINGS, "template": TEMPLATE},
    {"serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}},
)
WORKER_GROUP = record(
    {"groupName": NAME, "minReplicas": COUNT, "maxReplicas": COUNT, "rayStartParams": STRINGS, "template": TEMPLATE},
    {"replicas": COUNT, "numOfHosts": COUNT, "idleTimeoutSeconds": COUNT, "suspend": BOOL},
)
RAY_CLUSTER = record(
    {"headGroupSpec": HEAD_GROUP, "workerGroupSpecs": items(WORKER_GROUP), "rayVersion": STRING},
    {
        "enableInTreeAutoscaling": BOOL,
        "autoscalerOptions": record(
            {},
            {
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "idleTimeoutSeconds": COUNT,
                "resources": RESOURCES,
                "version": {"enum": ["v1", "v2"]},
            },
        ),
        "authOptions": record({"mode": {"enum": ["disabled", "token"]}}),
        "suspend": BOOL,
    },
)
RAY_JOB = record(
    {"entrypoint": STRING, "rayClusterSpec": RAY_CLUSTER},
    {
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "backoffLimit": COUNT,
        "shutdownAfterJobFinishes": BOOL,
        "ttlSecondsAfterFinished": COUNT,
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "runtimeEnvYAML": STRING,
        "suspend": BOOL,
    },
)
CRON: Schema = {"type": "string", "pattern": "^([0-9*/,-]+ ){4}[0-9*/,-]+$"}
# No concurrencyPolicy as in Kubernetes' CronJob; timeZone is KubeRay 1.7's.
RAY_CRON_JOB = record({"schedule": CRON, "jobTemplate": RAY_JOB}, {"suspend": BOOL})
CLAIM = record(
    {
        "accessModes": items({"enum": ["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]}),
        "resources": record({"requests": record({"storage": QUANTITY})}),
    },
    {"storageClassName": NAME},
)
SERVICE = record(
    {"selector": STRINGS, "ports": items(record({"port": PORT}, {"name": NAME, "targetPort": PORT}))},
    {"type": {"enum": ["ClusterIP"]}},
)
DEPLOYMENT = record(
    {"selector": record({"matchLabels": STRINGS}), "template": TEMPLATE},
    {"replicas": COUNT, "strategy": record({"type": {"enum": ["Recreate", "RollingUpdate"]}})},
)


def kind(version: str, name: str, rest: dict[str, Schema]) -> Schema:
    """A whole manifest."""
    return record({"apiVersion": {"const": version}, "kind": {"const": name}, "metadata": METADATA} | rest)


KINDS = {
    "RayCluster": kind("ray.io/v1", "RayCluster", {"spec": RAY_CLUSTER}),
    "RayJob": kind("ray.io/v1", "RayJob", {"spec": RAY_JOB}),
    "RayCronJob": kind("ray.io/v1", "RayCronJob", {"spec": RAY_CRON_JOB}),
    "ConfigMap": kind("v1", "ConfigMap", {"data": STRINGS}),
    "ServiceAccount": kind("v1", "ServiceAccount", {}),
    "PersistentVolumeClaim": kind("v1", "PersistentVolumeClaim", {"spec": CLAIM}),
    "Service": kind("v1", "Service", {"spec": SERVICE}),
    "Deployment": kind("apps/v1", "Deployment", {"spec": DEPLOYMENT}),
}
