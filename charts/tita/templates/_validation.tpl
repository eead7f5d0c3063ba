{{/* Contradictions between values, each with a remedy. The schema checks single values; its messages about
conditions name neither. */}}
{{- define "tita.validate" -}}
{{- include "tita.checkLabels" (dict "where" "commonLabels" "labels" .Values.commonLabels) -}}
{{- include "tita.checkLabels" (dict "where" "inference.podLabels" "labels" .Values.inference.podLabels) -}}
{{- include "tita.checkLabels" (dict "where" "metrics.serviceMonitor.labels" "labels" .Values.metrics.serviceMonitor.labels) -}}
{{- include "tita.checkLabels" (dict "where" "metrics.dashboard.labels" "labels" .Values.metrics.dashboard.labels) -}}
{{- $s3 := .Values.s3 -}}
{{- if and $s3.embedded.enabled $s3.endpoint -}}
{{- fail "s3.endpoint: the embedded store has its own endpoint; remove s3.endpoint, or set s3.embedded.enabled=false" -}}
{{- end -}}
{{- if not (or $s3.embedded.enabled $s3.bucket) -}}
{{- fail "s3.bucket is not set: name the bucket of the store, or run one in the cluster for a trial with s3.embedded.enabled=true" -}}
{{- end -}}
{{- $kms := hasPrefix "aws:kms" (default "" $s3.encryption) -}}
{{- if and $s3.kmsKeyId (not $kms) -}}
{{- fail "s3.kmsKeyId: a KMS key needs encryption by KMS; set s3.encryption to aws:kms or aws:kms:dsse, or remove s3.kmsKeyId" -}}
{{- end -}}
{{- if and $s3.embedded.enabled $kms -}}
{{- fail "s3.encryption: the embedded store has no KMS; remove s3.encryption, or set s3.embedded.enabled=false" -}}
{{- end -}}
{{- $inference := .Values.inference -}}
{{- include "tita.checkResources" (dict "where" "inference" "resources" $inference.resources "name" .Values.gpuResourceName "set" "inference.gpus") -}}
{{- include "tita.checkEnv" (dict "where" "inference.extraEnv" "env" $inference.extraEnv "set" (dict "TITA_GPUS" "inference.gpus")) -}}
{{- if and (eq (default "" $inference.form) "dpo") (not $inference.reference) -}}
{{- fail "inference.form: dpo needs the reward model before DPO; set inference.reference" -}}
{{- end -}}
{{- range $name, $weight := $inference.weights -}}
{{- if not (hasKey $inference.rewards $name) -}}
{{- fail (printf "inference.weights.%s: there is no such reward model; add inference.rewards.%s, or remove the weight" $name $name) -}}
{{- end -}}
{{- end -}}
{{- if and $inference.reference (not (or $inference.reward $inference.rewards)) -}}
{{- fail "inference.reference: has no effect without a reward model; set inference.reward, or remove inference.reference" -}}
{{- end -}}
{{- $vllm := $inference.vllm -}}
{{- if eq $inference.engine "vllm" -}}
{{- $needed := mul (int $vllm.tensorParallelSize) (int $vllm.pipelineParallelSize) -}}
{{- if and (int $inference.gpus) (ne (int $inference.gpus) (int $needed)) -}}
{{- fail (printf "inference.gpus: %d, but vLLM uses %d, the product of inference.vllm.tensorParallelSize and inference.vllm.pipelineParallelSize; remove inference.gpus, or change one of them" (int $inference.gpus) (int $needed)) -}}
{{- end -}}
{{- if has (default "" $inference.form) (list "vcd" "tita_vcd" "m3id" "cfg") -}}
{{- fail (printf "inference.form: engine vllm does not have %s; choose another form, or set inference.engine=transformers" $inference.form) -}}
{{- end -}}
{{- else if or (gt (int $vllm.tensorParallelSize) 1) (gt (int $vllm.pipelineParallelSize) 1) $vllm.maxModelLen (ne (toString $vllm.gpuMemoryUtilization) "0.9") $vllm.enforceEager -}}
{{- fail "inference.vllm: has no effect with engine transformers; set inference.engine=vllm, or remove inference.vllm" -}}
{{- end -}}
{{- if ge (int $inference.preStopSeconds) (int $inference.terminationGracePeriodSeconds) -}}
{{- fail "inference.preStopSeconds: must be less than inference.terminationGracePeriodSeconds" -}}
{{- end -}}
{{- with default dict $inference.strategy.rollingUpdate -}}
{{- $zero := list "0" "0%" -}}
{{- if and (eq $inference.strategy.type "RollingUpdate") (has (toString .maxSurge) $zero) (has (toString .maxUnavailable) $zero) -}}
{{- fail "inference.strategy.rollingUpdate: no pod may be replaced; set maxSurge or maxUnavailable to 1 or more" -}}
{{- end -}}
{{- end -}}
{{- if and $inference.ingress.enabled (not $inference.ingress.hosts) -}}
{{- fail "inference.ingress.hosts: name at least one host, or set inference.ingress.enabled=false" -}}
{{- end -}}
{{- if and $inference.httpRoute.enabled (not $inference.httpRoute.parentRefs) -}}
{{- fail "inference.httpRoute.parentRefs: name at least one Gateway, or set inference.httpRoute.enabled=false" -}}
{{- end -}}
{{- $scaling := $inference.autoscaling -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail "inference.autoscaling.minReplicas: must not be greater than inference.autoscaling.maxReplicas" -}}
{{- end -}}
{{- if $scaling.enabled -}}
{{- if not (int $scaling.targetWaitingRequests) -}}
{{- if eq $scaling.kind "keda" -}}
{{- fail "inference.autoscaling.targetWaitingRequests: KEDA scales by it only; set it to 1 or more" -}}
{{- else if not (int $scaling.targetCPUUtilizationPercentage) -}}
{{- fail "inference.autoscaling: no metric; set inference.autoscaling.targetWaitingRequests or inference.autoscaling.targetCPUUtilizationPercentage to 1 or more" -}}
{{- end -}}
{{- end -}}
{{- if and (eq $scaling.kind "keda") (int $scaling.targetCPUUtilizationPercentage) -}}
{{- fail "inference.autoscaling.targetCPUUtilizationPercentage: has no effect with KEDA, which scales by waiting requests; remove it, or set inference.autoscaling.kind=hpa" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Values that have no effect while a part of the release is off, one a line. They are listed and not refused, so
that a part can be turned off and on again without changes of the other values. */}}
{{- define "tita.withoutEffect" -}}
{{- $values := .Values -}}
{{- $off := dict -}}
{{- if not $values.inference.enabled -}}
{{- range $path := list "inference.autoscaling" "inference.httpRoute" "inference.ingress" "metrics.dashboard" "metrics.serviceMonitor" -}}
{{- $parts := splitList "." $path -}}
{{- if get (get (get $values (first $parts)) (last $parts)) "enabled" -}}
{{- $_ := set $off (printf "%s.enabled" $path) "inference.enabled" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $path, $switch := dict "networkPolicy.egress" "enabled" "networkPolicy.inferenceFrom" "enabled" "networkPolicy.metricsFrom" "enabled" "rbac.clusterRole" "create" "rbac.subjects" "create" "serviceAccount.annotations" "create" -}}
{{- $parts := splitList "." $path -}}
{{- $section := get $values (first $parts) -}}
{{- if and (get $section (last $parts)) (not (get $section $switch)) -}}
{{- $_ := set $off $path (printf "%s.%s" (first $parts) $switch) -}}
{{- end -}}
{{- end -}}
{{- range $path, $switch := $off }}
- {{ $path }}, because {{ $switch }} is false
{{- end }}
{{- end -}}

{{/* Contradictions between the values of one job.
Arguments: name, values (with `jobs.perJob.<name>`), gpuResourceName, commonLabels. */}}
{{- define "tita.jobs.validate" -}}
{{- $jobs := printf "jobs (for %s)" .name -}}
{{- with .values -}}
{{- include "tita.checkLabels" (dict "where" (printf "%s.labels" $jobs) "labels" .labels) -}}
{{- include "tita.checkLabels" (dict "where" (printf "%s.podLabels" $jobs) "labels" .podLabels) -}}
{{- include "tita.checkResources" (dict "where" $jobs "resources" .resources "name" $.gpuResourceName "set" (printf "jobs.perJob.%s.gpusPerNode" $.name)) -}}
{{- if and .rdma.enabled .rdma.resourceName -}}
{{- include "tita.checkResources" (dict "where" $jobs "resources" .resources "name" .rdma.resourceName "set" "jobs.rdma.count") -}}
{{- end -}}
{{- $set := dict "TITA_RUN" "each run" "TITA_LAUNCH_UID" "each run" "TITA_NODE_RANK" "each pod" "TITA_MASTER_ADDR" "each run" -}}
{{- range $variable, $key := dict "TITA_RECIPE" "recipe" "TITA_TRIES" "tries" "TITA_NUM_NODES" "nodes" "TITA_PROCS_PER_NODE" "gpusPerNode" "TITA_GPUS" "gpusPerNode" -}}
{{- $_ := set $set $variable (printf "jobs.perJob.%s.%s" $.name $key) -}}
{{- end -}}
{{- include "tita.checkEnv" (dict "where" (printf "%s.extraEnv" $jobs) "env" .extraEnv "set" $set) -}}
{{- range $where, $labels := dict (printf "%s.labels" $jobs) .labels "commonLabels" $.commonLabels -}}
{{- if and $.values.kueue.queueName (hasKey (default dict $labels) "kueue.x-k8s.io/queue-name") -}}
{{- fail (printf "%s: kueue.queueName sets kueue.x-k8s.io/queue-name; remove one of them" $where) -}}
{{- end -}}
{{- end -}}
{{- if and .cache.storageClass .cache.existingClaim -}}
{{- fail (printf "%s.cache: set either storageClass or existingClaim" $jobs) -}}
{{- end -}}
{{- range $volume := list "scratch" "cache" -}}
{{- $values := get $.values $volume -}}
{{- if and $values.storageClass (not $values.size) -}}
{{- fail (printf "%s.%s.size: a claim needs a size, such as 200Gi" $jobs $volume) -}}
{{- end -}}
{{- end -}}
{{- if and .rdma.enabled (not (and .rdma.resourceName .rdma.count)) -}}
{{- fail (printf "%s.rdma: set resourceName and count" $jobs) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A selector is immutable, so the API server would refuse an upgrade with another one, after helm has changed
other objects. Arguments: root, kind, name. */}}
{{- define "tita.checkSelector" -}}
{{- $found := lookup "apps/v1" .kind .root.Release.Namespace .name | default dict -}}
{{- $old := dig "spec" "selector" "matchLabels" "app.kubernetes.io/name" "" $found -}}
{{- $ours := eq .root.Release.Name (dig "metadata" "annotations" "meta.helm.sh/release-name" "" $found) -}}
{{- if and $old $ours (ne $old (include "tita.name" .root)) -}}
{{- fail (printf "nameOverride: %s %s selects pods by app.kubernetes.io/name=%s, which cannot be changed; set nameOverride=%s, or another fullnameOverride, too" .kind .name $old $old) -}}
{{- end -}}
{{- end -}}

{{/* The same for the class and the modes of a claim.
Arguments: root, name, where (the section of the values), storageClass, accessModes, remedy. */}}
{{- define "tita.checkClaim" -}}
{{- $found := lookup "v1" "PersistentVolumeClaim" .root.Release.Namespace .name | default dict -}}
{{- $ours := eq .root.Release.Name (dig "metadata" "annotations" "meta.helm.sh/release-name" "" $found) -}}
{{- $class := dig "spec" "storageClassName" "" $found -}}
{{- if and $ours .storageClass $class (ne .storageClass $class) -}}
{{- fail (printf "%s.storageClass: claim %s has the storage class %s, which cannot be changed; restore the value, or %s" .where .name $class .remedy) -}}
{{- end -}}
{{- $modes := dig "spec" "accessModes" list $found | sortAlpha -}}
{{- if and $ours $modes (ne (toJson $modes) (sortAlpha .accessModes | toJson)) -}}
{{- fail (printf "%s.accessModes: claim %s has %s, which cannot be changed; restore the value, or %s" .where .name (join ", " $modes) .remedy) -}}
{{- end -}}
{{- end -}}

{{/* Labels that the chart sets, and selects pods by, cannot be set in the values.
Arguments: where (the key of the values), labels. */}}
{{- define "tita.checkLabels" -}}
{{- range $name, $_ := .labels -}}
{{- if or (has $name (list "helm.sh/chart" "tita.dev/job")) (regexMatch "^app[.]kubernetes[.]io/(name|instance|version|component|managed-by)$" $name) -}}
{{- fail (printf "%s: the chart sets %s; remove it" $.where $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Variables that follow from other values. In `extraEnv` they would contradict the Job, or be lost in it.
Arguments: where (the key of the values), env (a list), set (what sets each of the variables). */}}
{{- define "tita.checkEnv" -}}
{{- range default list .env -}}
{{- if hasKey $.set .name -}}
{{- fail (printf "%s: %s is set by %s; remove it" $.where .name (get $.set .name)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* GPUs or RDMA devices among the resources would be overwritten, or held by a job that does not use them.
Arguments: where and set (keys of the values), resources, name (of the extended resource). */}}
{{- define "tita.checkResources" -}}
{{- range $kind := list "limits" "requests" -}}
{{- if hasKey (default dict (get (default dict $.resources) $kind)) $.name -}}
{{- fail (printf "%s.resources.%s: %s is set by %s; remove it" $.where $kind $.name $.set) -}}
{{- end -}}
{{- end -}}
{{- end -}}
