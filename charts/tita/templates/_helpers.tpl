{{/* A name as it is if it is valid as the name of a Service with a suffix: a DNS label of at most `max`
characters that starts with a letter. Otherwise a valid name with a hash, so that two long names differ.
Arguments: name, max. */}}
{{- define "tita.shorten" -}}
{{- $max := int .max -}}
{{- if and (le (len .name) $max) (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" .name) -}}
{{- .name -}}
{{- else -}}
{{- $valid := regexReplaceAll "[^-a-z0-9]" (lower .name) "-" -}}
{{- if not (regexMatch "^[a-z]" $valid) -}}{{- $valid = printf "r-%s" $valid -}}{{- end -}}
{{- printf "%s-%s" ($valid | trunc (int (sub $max 9)) | trimSuffix "-") (.name | sha256sum | trunc 8) -}}
{{- end -}}
{{- end -}}

{{- define "tita.name" -}}
{{- include "tita.shorten" (dict "name" (default .Chart.Name .Values.nameOverride) "max" 40) -}}
{{- end -}}

{{/* 40 characters at most: Service names are limited to 63, and suffixes follow. */}}
{{- define "tita.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- $name = .Release.Name -}}
{{- else -}}
{{- $name = printf "%s-%s" .Release.Name $name -}}
{{- end -}}
{{- include "tita.shorten" (dict "name" $name "max" 40) -}}
{{- end -}}

{{/* Selector labels. They are immutable, so they contain nothing that an upgrade changes. */}}
{{- define "tita.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tita.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "tita.labels" -}}
{{ include "tita.mergeLabels" (dict "root" . "extra" dict) }}
{{- end -}}

{{/* Labels of an object that has labels of its own in the values; they override `commonLabels`. Each name
appears once, because tools that read manifests (Flux, kustomize) reject duplicates. "tita.checkLabels" refuses
those of the chart.
Arguments: root, extra (a map). */}}
{{- define "tita.mergeLabels" -}}
{{ include "tita.podLabels" . }}
{{- with .root }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end }}
{{- end -}}

{{/* The same for the pods of a workload, without the versions: a change of those would restart the pods at each
upgrade of the chart. */}}
{{- define "tita.podLabels" -}}
{{ include "tita.selectorLabels" .root }}
{{- with merge (dict) (default dict .extra) (default dict .root.Values.commonLabels) }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "tita.image" -}}
{{- $image := .Values.image -}}
{{- $name := $image.repository -}}
{{- with $image.registry }}{{ $name = printf "%s/%s" . $name }}{{ end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "tita.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "tita.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* A colon is not allowed in namespaces and release names, so no other release has this name. */}}
{{- define "tita.clusterRoleName" -}}
{{- printf "tita:%s:%s:launcher" .Release.Namespace (include "tita.fullname" .) -}}
{{- end -}}

{{/* Common fields of every pod spec. No pod calls the API server, so no API token is mounted; IRSA and
workload identity project their own tokens. */}}
{{- define "tita.podDefaults" -}}
serviceAccountName: {{ include "tita.serviceAccountName" . | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml (default dict .Values.podSecurityContext) | nindent 2 }}
{{- end -}}

{{/* Scheduling fields of a pod spec. Argument: the section of the values that holds them (jobs,
inference, s3.embedded). */}}
{{- define "tita.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with .schedulerName }}
schedulerName: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Common fields of every container that runs the tita image. */}}
{{- define "tita.containerDefaults" -}}
image: {{ include "tita.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy | quote }}
securityContext:
  {{- toYaml (default dict .Values.securityContext) | nindent 2 }}
{{- end -}}

{{/* Container resources, with GPUs and RDMA devices added to the limits.
Arguments: resources, gpus, gpuResourceName, rdma (optional). */}}
{{- define "tita.resources" -}}
{{- $resources := deepCopy (default dict .resources) -}}
{{- $limits := default dict (get $resources "limits") -}}
{{- if gt (int .gpus) 0 -}}
{{- $_ := set $limits .gpuResourceName (int .gpus) -}}
{{- if and .rdma .rdma.enabled -}}
{{- $_ := set $limits .rdma.resourceName (int .rdma.count) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $resources "limits" $limits -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "tita.s3.name" -}}
{{- printf "%s-s3" (include "tita.fullname" .) -}}
{{- end -}}

{{- define "tita.s3.certificateName" -}}
{{- default (printf "%s-grpc" (include "tita.s3.name" .)) .Values.s3.embedded.existingCertificate -}}
{{- end -}}

{{- define "tita.s3.containerDefaults" -}}
{{- $image := .Values.s3.embedded.image -}}
image: {{ printf "%s%s" $image.repository (ternary (printf "@%s" $image.digest) (printf ":%s" $image.tag) (ne $image.digest "")) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy | quote }}
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  {{- toYaml (default dict .Values.securityContext) | nindent 2 }}
{{- end -}}

{{/* The claim of the embedded store, as YAML: `name`, and `create` if it is part of the release. A claim that
an earlier install or another name of the release left behind is found by its labels. Without access to a
cluster (`helm template`) it has the release's name. */}}
{{- define "tita.s3.claim" -}}
{{- $values := .Values.s3.embedded.persistence -}}
{{- $name := include "tita.s3.name" . -}}
{{- $create := true -}}
{{- if $values.existingClaim -}}
{{- $name = $values.existingClaim -}}
{{- $create = false -}}
{{- else -}}
{{- $own := dict -}}
{{- $others := dict -}}
{{- range (lookup "v1" "PersistentVolumeClaim" .Release.Namespace "").items | default list -}}
{{- $labels := default dict .metadata.labels -}}
{{- if eq .metadata.name $name -}}
{{- $own = . -}}
{{- else if and (eq (get $labels "app.kubernetes.io/instance") $.Release.Name) (eq (get $labels "app.kubernetes.io/component") "s3") -}}
{{- $_ := set $others .metadata.name . -}}
{{- end -}}
{{- end -}}
{{- if and (not $own) (gt (len $others) 1) -}}
{{- fail (printf "s3.embedded.persistence: release %s has several claims; set s3.embedded.persistence.existingClaim to one of %s" .Release.Name (keys $others | sortAlpha | join ", ")) -}}
{{- end -}}
{{- range $others -}}
{{- if not $own -}}{{- $own = . -}}{{- end -}}
{{- end -}}
{{- if $own -}}
{{- $name = $own.metadata.name -}}
{{- $owner := get (default dict $own.metadata.annotations) "meta.helm.sh/release-name" -}}
{{- if $own.metadata.deletionTimestamp -}}
{{- fail (printf "claim %s is being deleted, so the embedded store cannot use it; try again when `kubectl get pvc %s --namespace %s` no longer shows it, or set s3.embedded.persistence.existingClaim to another claim" $name $name .Release.Namespace) -}}
{{- end -}}
{{- if and $owner (ne $owner .Release.Name) -}}
{{- fail (printf "claim %s belongs to release %s; set s3.embedded.persistence.existingClaim=%s if that release no longer uses it, or choose another fullnameOverride" $name $owner $name) -}}
{{- end -}}
{{- $create = ne $owner "" -}}
{{- end -}}
{{- end -}}
{{- dict "name" $name "create" $create | toYaml -}}
{{- end -}}

{{- define "tita.s3.bucket" -}}
{{- if .Values.s3.embedded.enabled -}}{{ default "tita" .Values.s3.bucket }}{{- else -}}{{ .Values.s3.bucket }}{{- end -}}
{{- end -}}

{{- define "tita.s3.secretName" -}}
{{- if .Values.s3.existingSecret -}}
{{- .Values.s3.existingSecret -}}
{{- else if .Values.s3.embedded.enabled -}}
{{- include "tita.s3.name" . -}}
{{- end -}}
{{- end -}}

{{- define "tita.storeUri" -}}
s3://{{ include "tita.s3.bucket" . }}{{ with .Values.s3.prefix | default "" | trimAll "/" }}/{{ . }}{{ end }}
{{- end -}}

{{/* Environment variables: address and credentials of the store. */}}
{{- define "tita.storeEnv" -}}
- name: TITA_STORE
  value: {{ include "tita.storeUri" . | quote }}
{{- if .Values.s3.embedded.enabled }}
- name: TITA_S3_ENDPOINT_URL
  value: {{ printf "http://%s:8333" (include "tita.s3.name" .) | quote }}
- name: TITA_S3_PATH_STYLE
  value: "true"
{{- else }}
{{- with .Values.s3.endpoint }}
- name: TITA_S3_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
- name: TITA_S3_PATH_STYLE
  value: {{ .Values.s3.pathStyle | default false | quote }}
{{- end }}
{{- with .Values.s3.region }}
- name: TITA_S3_REGION
  value: {{ . | quote }}
{{- end }}
{{- with .Values.s3.encryption }}
- name: TITA_S3_ENCRYPTION
  value: {{ . | quote }}
{{- end }}
{{- with .Values.s3.kmsKeyId }}
- name: TITA_S3_KMS_KEY_ID
  value: {{ . | quote }}
{{- end }}
{{- if .Values.s3.requesterPays }}
- name: TITA_S3_REQUESTER_PAYS
  value: "true"
{{- end }}
{{- with include "tita.s3.secretName" . }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: {{ $.Values.s3.secretKeys.accessKeyId | quote }}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: {{ $.Values.s3.secretKeys.secretAccessKey | quote }}
- name: AWS_SESSION_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: {{ $.Values.s3.secretKeys.sessionToken | quote }}
      optional: true
{{- end }}
{{- end -}}

{{/* Environment of a container: the chart's variables and `extraEnv`, which overrides them. Each name
appears once, because server-side apply (the default of Helm 4) rejects duplicates.
Arguments: chart (YAML), extra (a list). */}}
{{- define "tita.mergeEnv" -}}
{{- $names := list -}}
{{- $extra := default list .extra -}}
{{- range $extra -}}{{- $names = append $names .name -}}{{- end -}}
{{- $env := list -}}
{{- range fromYamlArray .chart -}}
{{- if not (has .name $names) -}}{{- $env = append $env . -}}{{- end -}}
{{- end -}}
{{- concat $env $extra | toYaml -}}
{{- end -}}

{{/* Environment variable with the size limit of an emptyDir in GiB, less 5 % for file systems and the
kubelet's delay: the file system does not report the limit, and the kubelet evicts pods that exceed it.
Arguments: name, volume (a section of the values with existingClaim, storageClass and size). */}}
{{- define "tita.volumeGib" -}}
{{- $volume := .volume -}}
{{- if and $volume.size (not $volume.existingClaim) (not $volume.storageClass) -}}
{{- $bytes := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 -}}
{{- $unit := regexFind "[A-Za-z]*$" (toString $volume.size) -}}
{{- if hasKey $bytes $unit -}}
- name: {{ .name }}
  value: {{ divf (mulf 0.95 (trimSuffix $unit (toString $volume.size) | float64) (get $bytes $unit)) 1073741824 | printf "%.4g" | quote }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Environment variables of every pod: writable directories (the root file system is read-only), log
level, Hugging Face token. */}}
{{- define "tita.commonEnv" -}}
- name: HOME
  value: /home/tita
- name: TITA_CACHE_DIR
  value: /cache/tita
- name: HF_HOME
  value: /cache/huggingface
- name: TITA_SCRATCH_DIR
  value: /scratch
- name: TITA_LOG_LEVEL
  value: {{ .Values.logLevel | quote }}
{{- if .Values.allowCpu }}
- name: TITA_ALLOW_CPU
  value: "true"
{{- end }}
{{- with .Values.huggingface.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: {{ $.Values.huggingface.tokenKey | quote }}
{{- end }}
{{- end -}}

{{/* Mounts of the writable directories. */}}
{{- define "tita.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/tita
- name: cache
  mountPath: /cache
- name: scratch
  mountPath: /scratch
- name: shm
  mountPath: /dev/shm
{{- end -}}

{{/* Volumes of the writable directories. The default /dev/shm of 64 MiB is too small for data loaders
and NCCL. Arguments: cache, scratch (volume sources), shmSize. */}}
{{- define "tita.volumes" -}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
- name: cache
  {{- toYaml .cache | nindent 2 }}
- name: scratch
  {{- toYaml .scratch | nindent 2 }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .shmSize | quote }}
{{- end -}}

{{/* Volume source: an existing claim, a generic ephemeral claim, or an emptyDir on the node's disk.
Arguments: root, volume (a section of the values with existingClaim, storageClass and size, all optional). */}}
{{- define "tita.volumeSource" -}}
{{- $volume := .volume -}}
{{- if $volume.existingClaim -}}
persistentVolumeClaim:
  claimName: {{ $volume.existingClaim | quote }}
{{- else if $volume.storageClass -}}
ephemeral:
  volumeClaimTemplate:
    {{- with .root.Values.commonLabels }}
    metadata:
      labels:
        {{- toYaml . | nindent 8 }}
    {{- end }}
    spec:
      accessModes:
        - ReadWriteOnce
      storageClassName: {{ $volume.storageClass | quote }}
      resources:
        requests:
          storage: {{ $volume.size | quote }}
{{- else if $volume.size -}}
emptyDir:
  sizeLimit: {{ $volume.size | quote }}
{{- else -}}
emptyDir: {}
{{- end -}}
{{- end -}}
