{{- define "tita.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Room is left for suffixes: a Service's name ends at 63 characters. */}}
{{- define "tita.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "tita.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "tita.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects an object of ours; these never change over a release's life. */}}
{{- define "tita.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tita.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tita.labels" -}}
{{ include "tita.selectorLabels" . }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
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

{{/* What every pod of ours starts with. The token is of no use to pods that never call the API;
webhooks of IRSA and workload identity project their own. */}}
{{- define "tita.podBasics" -}}
serviceAccountName: {{ include "tita.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- end -}}

{{/* Where a pod runs. The argument is the part of the values that has these keys. */}}
{{- define "tita.placement" -}}
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
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- end -}}

{{- define "tita.containerBasics" -}}
image: {{ include "tita.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
{{- end -}}

{{/* `resources` of a container with its GPUs and RDMA devices laid into the limits.
Arguments: resources, gpus, gpuResourceName, rdma (optional). */}}
{{- define "tita.resources" -}}
{{- $resources := deepCopy .resources -}}
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

{{- define "tita.s3.bucket" -}}
{{- if .Values.s3.embedded.enabled -}}{{ default "tita" .Values.s3.bucket }}{{- else -}}{{ .Values.s3.bucket }}{{- end -}}
{{- end -}}

{{- define "tita.s3.secret" -}}
{{- if .Values.s3.existingSecret -}}
{{- .Values.s3.existingSecret -}}
{{- else if .Values.s3.embedded.enabled -}}
{{- include "tita.s3.name" . -}}
{{- end -}}
{{- end -}}

{{- define "tita.s3.store" -}}
s3://{{ include "tita.s3.bucket" . }}{{ with .Values.s3.prefix | trimAll "/" }}/{{ . }}{{ end }}
{{- end -}}

{{/* Where the store is and how to get in, as environment variables. */}}
{{- define "tita.storeEnv" -}}
- name: TITA_STORE
  value: {{ include "tita.s3.store" . | quote }}
{{- if .Values.s3.embedded.enabled }}
- name: TITA_S3_ENDPOINT_URL
  value: http://{{ include "tita.s3.name" . }}:8333
- name: TITA_S3_PATH_STYLE
  value: "true"
{{- else }}
{{- with .Values.s3.endpoint }}
- name: TITA_S3_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
- name: TITA_S3_PATH_STYLE
  value: {{ .Values.s3.pathStyle | quote }}
{{- end }}
{{- with .Values.s3.region }}
- name: TITA_S3_REGION
  value: {{ . | quote }}
{{- end }}
{{- with include "tita.s3.secret" . }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.s3.secretKeys.accessKeyId }}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.s3.secretKeys.secretAccessKey }}
- name: AWS_SESSION_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.s3.secretKeys.sessionToken }}
      optional: true
{{- end }}
{{- end -}}

{{/* A container's environment: the chart's, and `extraEnv`, which wins. A name that stood there twice
would be refused by server-side apply, which is how Helm 4 installs.
Arguments: chart (YAML), extra (a list). */}}
{{- define "tita.env" -}}
{{- $names := list -}}
{{- range .extra -}}{{- $names = append $names .name -}}{{- end -}}
{{- $env := list -}}
{{- range fromYamlArray .chart -}}
{{- if not (has .name $names) -}}{{- $env = append $env . -}}{{- end -}}
{{- end -}}
{{- concat $env .extra | toYaml -}}
{{- end -}}

{{/* The places a pod may write, and what looks for them there. The root file system is read-only. */}}
{{- define "tita.writableEnv" -}}
- name: HOME
  value: /home/tita
- name: TITA_CACHE_DIR
  value: /cache/tita
- name: HF_HOME
  value: /cache/huggingface
- name: TITA_SCRATCH_DIR
  value: /scratch
- name: TITA_LOG_LEVEL
  value: {{ .Values.logLevel }}
{{- with .Values.huggingface.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.huggingface.tokenKey }}
{{- end }}
{{- end -}}

{{- define "tita.writableMounts" -}}
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

{{/* Arguments: cache and scratch (volume sources without a name), shmSize. Without the last,
/dev/shm is 64 MiB, and data loaders and NCCL die of it. */}}
{{- define "tita.writableVolumes" -}}
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
    sizeLimit: {{ .shmSize }}
{{- end -}}

{{/* A volume source: a claim that exists, a generic ephemeral claim, or the node's disk.
Argument: a part of the values with existingClaim, storageClass, accessModes, size (all optional
but size). */}}
{{- define "tita.volumeSource" -}}
{{- if .existingClaim -}}
persistentVolumeClaim:
  claimName: {{ .existingClaim }}
{{- else if .storageClass -}}
ephemeral:
  volumeClaimTemplate:
    spec:
      accessModes:
        - ReadWriteOnce
      storageClassName: {{ .storageClass }}
      resources:
        requests:
          storage: {{ .size }}
{{- else if .size -}}
emptyDir:
  sizeLimit: {{ .size }}
{{- else -}}
emptyDir: {}
{{- end -}}
{{- end -}}
